"""Which images are encoded, in which parts: every image of every split is kept or rejected once."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestration.data.features import ImageReason, Part, plan_images
from orchestration.data.manifest import held_out_rank


def records_table(rows: list[tuple[str, int, str | None]]) -> pa.Table:
    """(split, image, label) as the columns that a plan is made from."""
    counters: dict[str, int] = {}
    places = []
    for split, _, _ in rows:
        places.append(counters.get(split, 0))
        counters[split] = places[-1] + 1
    return pa.table(
        {
            "image_sha256": [f"image-{image}" for _, image, _ in rows],
            "label": pa.array([label for _, _, label in rows], pa.string()),
            "row": pa.array(places, pa.int64()),
            "split": [split for split, _, _ in rows],
        }
    )


ROWS = st.lists(
    st.tuples(
        st.sampled_from(["train", "validation", "test"]), st.integers(0, 12), st.sampled_from([None, "joy", "fear"])
    ),
    min_size=1, max_size=60,
)  # fmt: skip


@given(rows=ROWS, size=st.integers(1, 7))
@settings(deadline=None)
def test_every_image_of_every_split_is_kept_or_rejected_once(
    rows: list[tuple[str, int, str | None]], size: int
) -> None:
    plan = plan_images(records_table(rows), size)
    pairs = {(split, f"image-{image}") for split, image, _ in rows}
    kept = [(p.split, i) for p in plan.parts for i, label in zip(p.ids, p.labels, strict=True) if label is not None]
    rejected = [(rejection.split, rejection.id) for rejection in plan.rejections]
    assert sorted(kept + rejected) == sorted(pairs)
    assert (plan.num_records, plan.num_images) == (len(rows), len(pairs))
    assert all(1 <= len(part.ids) <= size for part in plan.parts)
    # Read are all but those that a split which is held out more has.
    read = [(part.split, image) for part in plan.parts for image in part.ids]
    assert len(set(read)) == len(read)
    for split, image in pairs:
        holder = min((s for s, i in pairs if i == image), key=held_out_rank)
        assert ((split, image) in read) == (split == holder)


@given(rows=ROWS)
@settings(deadline=None)
def test_an_images_label_is_that_of_its_records(rows: list[tuple[str, int, str | None]]) -> None:
    plan = plan_images(records_table(rows), 5)
    reasons = {(rejection.split, rejection.id): rejection.reason for rejection in plan.rejections}
    for part in plan.parts:
        for image, label, row in zip(part.ids, part.labels, part.rows, strict=True):
            mine = [(s, i, w) for s, i, w in rows if s == part.split]
            named = {word for _, i, word in mine if f"image-{i}" == image} - {None}
            expected = named.pop() if len(named) == 1 else None
            assert label == expected
            if len(named) > 1:
                assert reasons[part.split, image] is ImageReason.CONFLICTING_LABELS
            assert f"image-{mine[row][1]}" == image
            assert row == min(place for place, (_, i, _) in enumerate(mine) if f"image-{i}" == image)


def test_reasons_say_what_is_wrong() -> None:
    rows: list[tuple[str, int, str | None]] = [
        ("train", 1, "joy"), ("train", 2, None), ("train", 3, "joy"), ("train", 3, "fear"), ("train", 4, "joy"),
        ("test", 4, "joy"),
    ]  # fmt: skip
    plan = plan_images(records_table(rows), 10)
    assert [(r.split, r.id, str(r.reason), r.detail, r.row) for r in plan.rejections] == [
        ("train", "image-2", "no_label", "no record of this image names a label", 1),
        ("train", "image-3", "conflicting_labels", "its records name fear and joy", 2),
        ("train", "image-4", "image_in_two_splits", "test holds it too", 4),
    ]
    assert [(p.name, p.ids, p.labels) for p in plan.parts] == [
        ("train-00000", ["image-1", "image-2", "image-3"], ["joy", None, None]),
        ("test-00000", ["image-4"], ["joy"]),
    ]


def test_a_part_travels_as_a_row() -> None:
    part = Part("train", 3, np.array([1, 5], dtype=np.int64), ["a", "b"], ["joy", None])
    back = Part.unpack(pa.Table.from_pylist([part.pack()]).to_pylist()[0])
    assert (back.name, back.rows.tolist(), back.ids, back.labels) == ("train-00003", [1, 5], ["a", "b"], ["joy", None])
