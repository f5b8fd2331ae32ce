"""Measure the overhead of synthesis: `python benchmarks/synthesize.py [overhead] [loop] [ray_llm] [memory]`.

Needs S3 (`tinyemo platform up`); tests/orchestration/synthesize/teacher_server.py stands for a teacher.

overhead: the whole job, from photographs to records in S3, with a teacher that answers at once. `records_per_s` is by
the clock; `records_per_driver_cpu_s` is what one core of the driver could do if nothing else ran on the machine.
loop, ray_llm: a teacher that takes 0.25 s an answer and any number at once. Ours beside a loop over `openai`'s client,
one request at a time, and beside Ray Data LLM's HttpRequestProcessorConfig, as it comes and with two actors.
memory: the driver's peak at 100,000 work items. The endpoint answers in process here, so that it does not take an hour;
items, ledger, gates and records are the real ones.
"""

from __future__ import annotations

import json
import os
import resource
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "orchestration" / "synthesize"))
sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script

from benchmarks.machine import write_results
from cluster.environment import load_platform_environment

TESTS = Path(__file__).parents[1] / "tests" / "orchestration" / "synthesize"
DELAY_S = 0.25
NUM_OVERHEAD, NUM_OURS, NUM_SEQUENTIAL, NUM_RAY_LLM = 250, 100, 24, 128
NUM_MEMORY = 25_000


@contextmanager
def teacher(delay_s: float) -> Iterator[str]:
    """A teacher in a process of its own; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, str(TESTS / "teacher_server.py"), str(port), str(delay_s)])
    try:
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def write_inputs(folder: Path, url: str, count: int) -> Path:
    """`count` photographs of noise and a recipe of four tasks for a text-only teacher."""
    rows = ["image,label,subject,split"]
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"p{number:06d}.png")
        label = ("awe", "amusement", "fear", "sadness")[number % 4]
        rows.append(f"p{number:06d}.png,{label},a place called {number},{'test' if number % 10 == 0 else 'train'}")
    (folder / "table.csv").write_text("\n".join(rows) + "\n")
    tasks = "".join(
        f'[tasks.{name}]\ncontext = ["label", "subject"]\n' for name in ("caption", "vqa", "sqa", "reasoning")
    )
    path = folder / "bench.toml"
    path.write_text(
        f'name = "bench"\nroot = "s3://tinyemo/synthesis-bench/{secrets.token_hex(4)}"\n'
        f'[images]\nsource = "{folder}"\ntables = ["{folder}/table.csv"]\n{tasks}'
        f'[teachers.fast]\nbase_url = "{url}"\nmodel = "teacher"\n'
    )
    return path


def run_job(count: int, delay_s: float) -> dict[str, Any]:
    """Figures of one synthesis."""
    from orchestration.synthesize.synthesis import synthesize
    from orchestration.synthesize.synthesis_recipe import load_synthesis

    with tempfile.TemporaryDirectory() as name, teacher(delay_s) as url:
        recipe = load_synthesis(str(write_inputs(Path(name), url, count)))
        began_at, cpu_at = time.perf_counter(), time.process_time()
        result = synthesize(recipe, has_dataset=False)
        seconds, cpu_s = time.perf_counter() - began_at, time.process_time() - cpu_at
    assert result.num_accepted + sum(result.rejected.values()) == result.num_requested == 4 * count
    return {
        "items": result.num_requested,
        "records_per_s": round(result.num_requested / seconds, 1),
        "answers_per_s": round(result.answers_per_s, 1),
        "records_per_driver_cpu_s": round(result.num_requested / cpu_s, 1),
    }


def measure_overhead() -> dict[str, Any]:
    """The whole job beside a teacher that answers at once."""
    run_job(10, 0.0)  # imports what the job needs
    found = run_job(NUM_OVERHEAD, 0.0)
    return {"records_per_s": found["records_per_s"], "overhead": {**found, "load_1min": os.getloadavg()[0]}}


def measure_loop() -> dict[str, Any]:
    """Answers a second of ours and of a loop, with the same teacher."""
    import openai

    ours = run_job(NUM_OURS, DELAY_S)["answers_per_s"]
    with teacher(DELAY_S) as url:
        client = openai.OpenAI(api_key="none", base_url=url, max_retries=0)
        began_at = time.perf_counter()
        for number in range(NUM_SEQUENTIAL):
            client.chat.completions.create(model="teacher", messages=[{"role": "user", "content": f"{number}"}])
        sequential = NUM_SEQUENTIAL / (time.perf_counter() - began_at)
    figures = {"delay_s": DELAY_S, "ours": ours, "loop": round(sequential, 2), "load_1min": os.getloadavg()[0]}
    return {"ours_vs_sequential": round(ours / sequential, 1), "answers_per_s": figures}


def measure_ray_llm() -> dict[str, Any]:
    """Answers a second of ours and of Ray Data LLM, with the same teacher."""
    ours = run_job(NUM_OURS, DELAY_S)["answers_per_s"]
    with teacher(DELAY_S) as url:
        rates = {f"{actors} actors": round(run_ray_llm(url, actors), 2) for actors in (1, 2)}
    figures = {"delay_s": DELAY_S, "ours": ours, **rates, "load_1min": os.getloadavg()[0]}
    return {"ours_vs_ray_llm": round(ours / max(rates.values()), 1), "ray_llm_answers_per_s": figures}


def run_ray_llm(url: str, num_actors: int) -> float:
    """Answers a second of Ray Data LLM's processor, from the first block to the last, its start not counted."""
    import ray
    from ray.data.llm import HttpRequestProcessorConfig, build_processor

    if not ray.is_initialized():
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)
    config = HttpRequestProcessorConfig(url=f"{url}/chat/completions", concurrency=num_actors, batch_size=16)
    processor = build_processor(
        config,
        preprocess=lambda row: {
            "payload": {"model": "teacher", "messages": [{"role": "user", "content": str(row["id"])}]}
        },
        postprocess=lambda row: {"at": time.time(), "text": json.dumps(row["http_response"])[:10]},
    )
    rows = ray.data.range(NUM_RAY_LLM, override_num_blocks=8)
    times = sorted(row["at"] for row in processor(rows).take_all())
    # Answers of a batch come out together: the span is from the first batch to the last.
    first = sum(at < times[0] + DELAY_S for at in times)
    return (len(times) - first) / max(1e-3, times[-1] - times[0])


def measure_memory() -> dict[str, Any]:
    """The peak of a driver with 100,000 work items, in a process of its own."""
    command = [sys.executable, __file__, "memory-alone"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return {"driver_peak_mib_100k": found["peak_mib"], "memory": found}


def memory_alone() -> None:
    """Print the peak of this process."""
    from teacher_server import good_text

    from orchestration.synthesize import requesting
    from orchestration.synthesize.answer_ledger import Answer
    from orchestration.synthesize.synthesis import synthesize
    from orchestration.synthesize.synthesis_recipe import load_synthesis

    async def ask(_self: Any, item: Any, _image: Any, may_send: Any) -> Answer:
        may_send()
        text = good_text(int(item.key[:8], 16)) + (f" So people feel {item.label}." if item.label else "")
        return Answer(item.key, item.task, item.teacher, text=text, prompt_tokens=50, completion_tokens=20)

    requesting.Endpoint.ask = ask  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as name:
        recipe = load_synthesis(str(write_inputs(Path(name), "http://127.0.0.1:1/v1", NUM_MEMORY)))
        began_at = time.perf_counter()
        result = synthesize(recipe, has_dataset=False)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    figures = {
        "items": result.num_requested,
        "accepted": result.num_accepted,
        "rejected": result.rejected,
        "peak_mib": round(peak),
        "seconds": round(time.perf_counter() - began_at, 1),
        "answers_per_s": round(result.answers_per_s),
    }
    print(json.dumps(figures))


def main() -> None:
    """Run the parts that are named, or all."""
    load_platform_environment()
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    if sys.argv[1:] == ["memory-alone"]:
        memory_alone()
        return
    parts = {
        "overhead": measure_overhead,
        "loop": measure_loop,
        "ray_llm": measure_ray_llm,
        "memory": measure_memory,
    }
    for name in sys.argv[1:] or parts:
        figures = parts[name]()
        print(json.dumps(figures, indent=1), flush=True)
        write_results("synthesize", figures)


if __name__ == "__main__":
    main()
