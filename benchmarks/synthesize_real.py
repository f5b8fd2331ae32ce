"""Synthesis end to end with a real teacher: `TINYEMO_MIRROR=... python benchmarks/synthesize_real.py [PHOTOGRAPHS]`.

SmolLM2-135M-Instruct behind `transformers serve`, which is killed once and started again; the job is killed twice. The
records must equal those of a job that nobody disturbed. Then `tinyemo train` takes a few steps on the data set. Needs
the platform, and photographs in TINYEMO_MIRROR/fi and oasis. The teacher reads texts alone: label and theme.
"""

from __future__ import annotations

import csv
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script

from benchmarks.machine import write_results
from cluster.environment import load_platform_environment
from orchestration.assets.catalogue import find_asset, get_asset
from orchestration.data.oasis import QUADRANTS, OasisRules, quadrant_of, read_photographs
from orchestration.services import storage

DEADLINE_S = 1500.0
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""SmolLM2's own template; dequantising leaves it out."""
CLI = [sys.executable, "-c", "from orchestration.cli import main; main()"]


def write_teacher(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's model and tokenizer as a folder that `transformers serve` reads."""
    import torch
    from transformers import AutoTokenizer

    from tinyemo.reasoner.loading import load_gguf

    load_gguf(gguf, torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHATML)


def write_inputs(folder: Path, count: int) -> None:
    """Half of the photographs from fi, half from OASIS, and a table of their labels and what is told of them."""
    mirror = Path(os.environ["TINYEMO_MIRROR"])
    rows = [["image", "label", "about", "split"]]
    with (mirror / "fi" / "labels.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    for row in found[:: max(1, len(found) // (count // 2))][: count // 2]:
        shutil.copy(mirror / "fi" / "images" / row["image"], folder)
        rows.append([row["image"], row["emotion"], "a photograph that somebody shared online", row["split"]])
    photographs = [found for found in read_photographs(mirror / "oasis") if quadrant_of(found, OasisRules())]
    for photograph in photographs[:: max(1, len(photographs) // (count // 2))][: count // 2]:
        quadrant = quadrant_of(photograph, OasisRules())
        assert quadrant is not None
        shutil.copy(mirror / "oasis" / "images" / photograph.image, folder)
        about = f"a photograph of {photograph.category.lower()} with the theme {photograph.theme.lower()}"
        rows.append([photograph.image, QUADRANTS[quadrant][0], about, "train"])
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def write_recipe(path: Path, photographs: Path, root: str, url: str, model: str) -> None:
    """Four tasks, one teacher, greedy."""
    path.write_text(
        f'name = "synthesize-real"\nroot = "{root}"\ndatasets = "{root}/datasets"\n'
        f'[images]\nsource = "{photographs}"\ntables = ["{photographs}/table.csv"]\n'
        '[tasks.caption]\ncontext = ["label", "about"]\nmax_words = 60\n'
        '[tasks.vqa]\ncontext = ["about"]\nmax_words = 60\nnear_duplicate = 0\n'
        '[tasks.sqa]\ncontext = ["label", "about"]\nmax_words = 60\nnear_duplicate = 0\n'
        '[tasks.reasoning]\ncontext = ["about"]\nmax_words = 80\nmin_words = 8\n'
        f'[teachers.smollm2]\nbase_url = "{url}/v1"\nmodel = "{model}"\nmax_tokens = 64\ntimeout_s = 300\n'
    )


class Server:
    """`transformers serve` on one port."""

    def __init__(self, model: Path, port: int) -> None:
        self.model, self.port, self.process = model, port, self._start(model, port)

    @staticmethod
    def _start(model: Path, port: int) -> subprocess.Popen[bytes]:
        program = str(Path(sys.executable).parent / "transformers")
        command = [program, "serve", str(model), "--port", str(port), "--device", "cpu"]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def wait(self) -> None:
        """Wait until it listens."""
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.5)
        raise RuntimeError("transformers serve does not listen")

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        """Start it again on the same port."""
        self.process = self._start(self.model, self.port)


def num_stored(folder: str) -> int:
    """Answers in the ledger."""
    from orchestration.synthesize.answer_ledger import read_answers

    return len(read_answers(folder, columns=("key",)))


def run_disturbed(recipe: Path, folder: str, server: Server, total: int) -> dict[str, Any]:
    """Kill the job after a quarter and after three quarters, the server after a half; the last start's result."""
    for share in (0.25, 0.75):
        job = subprocess.Popen([*CLI, "synthesize", str(recipe), "--json"], stdout=subprocess.DEVNULL)
        is_disturbed = share < 0.5
        while (stored := num_stored(folder)) < share * total and job.poll() is None:
            if not is_disturbed and stored >= 0.5 * total:
                server.kill()
                time.sleep(5)
                server.restart()
                is_disturbed = True
            time.sleep(0.5)
        job.kill()
        job.wait()
        print(f"killed the job at {num_stored(folder)} of {total} answers", flush=True)
    return run_undisturbed(recipe)


def run_undisturbed(recipe: Path) -> dict[str, Any]:
    """One start to its end."""
    done = subprocess.run([*CLI, "synthesize", str(recipe), "--json"], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def train(dataset: str) -> dict[str, Any]:
    """A few steps of the shipped reasoning recipe on the data set."""
    options = [
        f"name=synthesize-real-{secrets.token_hex(3)}",
        f'records.datasets=["{dataset}"]',
        "stages.pretrain.num_epochs=0.2",
        "stages.finetune.num_epochs=0.2",
        "workers.num_workers=1",
    ]
    arguments = [part for option in options for part in ("--set", option)]
    command = [*CLI, "train", "reasoning-offline", "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"exit_code": done.returncode, "error": done.stderr.strip().splitlines()[-1][:300]}
    stages = json.loads(done.stdout)["stages"]
    return {
        name: {key: stage[key] for key in ("num_steps", "first_loss", "last_loss")} for name, stage in stages.items()
    }


def main() -> None:
    """Run and write `end_to_end`."""
    load_platform_environment()
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    model = find_asset("smollm2-135m")
    with tempfile.TemporaryDirectory(prefix="tinyemo-real-") as name:
        folder = Path(name) / "SmolLM2-135M-Instruct"
        folder.mkdir()
        write_teacher(get_asset(model.name) / model.files[0], folder)
        photographs = Path(name) / "photographs"
        photographs.mkdir()
        write_inputs(photographs, count)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        server = Server(folder, port)
        server.wait()
        roots = {kind: f"s3://tinyemo/synthesis-real/{secrets.token_hex(4)}" for kind in ("whole", "disturbed")}
        found = {}
        try:
            for kind, root in roots.items():
                recipe = Path(name) / f"{kind}.toml"
                write_recipe(recipe, photographs, root, f"http://127.0.0.1:{port}", str(folder))
                began_at = time.monotonic()
                ledger = f"{root}/synthesize-real"
                total = found["whole"]["num_requested"] if found else 0
                result = run_disturbed(recipe, ledger, server, total) if found else run_undisturbed(recipe)
                found[kind] = result | {"wall_s": round(time.monotonic() - began_at)}
                print(json.dumps(found[kind], indent=1), flush=True)
        finally:
            server.kill()
    whole, disturbed = found["whole"], found["disturbed"]
    samples = storage.read_bytes(whole["records"]).decode().splitlines()[:3]
    kept = ("num_requested", "num_accepted", "rejected", "num_lost", "requests", "tokens", "answers_per_s", "wall_s")
    figures = {
        "photographs": count,
        "equal": whole["records_sha256"] == disturbed["records_sha256"],
        "whole": {key: whole[key] for key in kept},
        "disturbed": {key: disturbed[key] for key in kept},
        "training": train(disturbed["dataset"]) if disturbed["dataset"] else None,
        "first_texts": [json.loads(line)["conversations"][1]["value"] for line in samples],
    }
    print(json.dumps(figures, indent=1))
    write_results("synthesize", {"end_to_end": figures})


if __name__ == "__main__":
    main()
