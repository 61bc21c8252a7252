"""The cells of every suite: a workload, its request, and who takes part under which label."""

from dataclasses import dataclass
from typing import Any

PEERS = ("tt", "transformers", "torchtune", "litgpt")
Contestants = dict[str, dict[str, Any]]  # label -> what it adds to the request; the contestant is its first word


@dataclass(frozen=True, kw_only=True)
class Cell:
    """``unit``: of the work; the rate is work per CPU second. ``tolerance``: of figures that must be equal, as a share.

    ``inputs``: names of what is made before the clock starts: model, rows, tasks.
    """

    name: str
    workload: str
    request: dict[str, Any]
    contestants: Contestants
    unit: str = "tokens"
    tolerance: float = 0.02
    inputs: tuple[str, ...] = ("model",)


def of(*labels: str) -> Contestants:
    return {label: {} for label in labels}


def training() -> list[Cell]:
    """A step on batch 4 x 512. ``bf16`` is pure bf16; ``mixed`` keeps in fp32 what trains, as tt run does."""
    cells = []
    for shape, steps in (("10.5M", 4), ("134M", 2)):
        for method in ("full", "lora q,v", "lora", "qlora"):
            for dtype in ("bf16", "fp32", "mixed"):
                if dtype != "bf16" and method in ("lora q,v", "qlora"):
                    continue
                who = of("tt", "transformers") if dtype == "mixed" else of(*PEERS, "limits")
                if method == "qlora":
                    who = of("tt", "transformers", "torchtune", "limits")
                if dtype == "bf16" and method in ("full", "lora"):
                    who |= {f"{name} compiled": {"compile": True} for name in PEERS}
                request = {"shape": shape, "method": method, "dtype": dtype, "batch": 4, "length": 512, "steps": steps}
                tolerance = 0.001 if dtype == "fp32" else 0.02
                cells.append(Cell(name=f"{shape} {method} {dtype}", workload="train", request=request,
                                  contestants=who, tolerance=tolerance))  # fmt: skip
    return cells


def growth() -> list[Cell]:
    """Step time against length, with a window, against packed documents, and on two ranks."""
    base = {"shape": "10.5M", "method": "full", "dtype": "bf16", "batch": 1, "steps": 2}
    cells = [
        Cell(name=f"length {length}", workload="train", request=base | {"length": length, "batch": 8192 // length},
             contestants=of("tt", "transformers"))
        for length in (512, 1024, 2048, 4096, 8192)
    ]  # fmt: skip
    cells.append(Cell(name="length 8192, window 512", workload="train", contestants=of("tt", "transformers"),
                      request=base | {"length": 8192, "window": 512}))  # fmt: skip
    for document in (128, 512, 2048):
        request = base | {"length": 8192, "document": document}
        cells.append(Cell(name=f"length 8192, documents of {document}", workload="train", request=request,
                          contestants=of("tt", "transformers")))  # fmt: skip
    ranks = {"tt": {}, "tt on 2 ranks": {"ranks": 2}}
    request = base | {"batch": 8, "length": 512, "dtype": "mixed", "steps": 4}
    return [*cells, Cell(name="2 ranks", workload="train", request=request, contestants=ranks)]


def instructions() -> list[Cell]:
    """From rows on disk to the end of an epoch, with the lengths of real instruction data."""
    base = {"shape": "10.5M", "dtype": "bf16", "batch": 4, "length": 1024, "rows": 400}
    sft = of("tt", "transformers", "trl", "torchtune", "litgpt")
    cells = [
        Cell(name=f"SFT {method}", workload="sft", request=base | {"method": method, "kind": "tokens"}, contestants=sft,
             inputs=("model", "rows"), tolerance=0.05)
        for method in ("full", "lora")
    ]  # fmt: skip
    request = base | {"method": "lora", "kind": "pairs", "rows": 200}
    return [*cells, Cell(name="DPO lora", workload="dpo", request=request, contestants=of("tt", "trl"),
                         inputs=("model", "rows"), tolerance=0.05)]  # fmt: skip


def data() -> list[Cell]:
    base = {"rows": 60_000, "packing": True, "shape": "134M", "dtype": "bf16"}
    everyone = of("tt", "trl", "torchtune", "transformers", "limits")
    few = of("tt", "trl", "limits")
    made: dict[str, tuple[dict[str, Any], Contestants]] = {
        "text, packed": ({"kind": "text"}, everyone),
        "text with a character that is not ASCII, packed": ({"kind": "accents"}, everyone),
        "text, not packed": ({"kind": "text", "packing": False}, few),
        "conversations, packed": ({"kind": "chats", "rows": 20_000}, few),
        "text, streamed and packed": ({"kind": "text", "streaming": True}, of("tt")),
    }
    return [Cell(name=name, workload="data", request=base | more, contestants=who, unit="rows",
                 inputs=("tokenizer", "rows")) for name, (more, who) in made.items()]  # fmt: skip


def ckpt() -> list[Cell]:
    base = {"shape": "1.1B", "dtype": "bf16", "shards": 3}
    return [
        Cell(name="load, save", workload="ckpt", request=base | {"way": "model"}, unit="MB",
             contestants=of("tt", "transformers", "torchtune", "litgpt", "limits")),
        Cell(name="convert, hf to hf", workload="ckpt", request=base | {"way": "convert"}, unit="MB",
             contestants=of("tt", "limits")),
    ]  # fmt: skip


def loss() -> list[Cell]:
    base = {"positions": 2048, "vocabulary": 128_256, "width": 1024}
    cells = []
    for name, who in (("cross entropy", of(*PEERS, "limits")), ("log-probabilities", of("tt", "trl", "limits"))):
        for head in ("frozen", "trained"):
            request = base | {"loss": name, "head": head}
            cells.append(
                Cell(name=f"{name}, {head} head", workload="loss", request=request, contestants=who, inputs=())
            )
    return cells


def decode() -> list[Cell]:
    cells = []
    ways: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
        "batch 1": ({"batch": 1}, (*PEERS, "limits")),
        "batch 16": ({"batch": 16}, ("tt", "transformers", "torchtune", "limits")),
        "batch 16, ragged": ({"batch": 16, "ragged": True}, ("tt", "transformers", "limits")),
    }
    for name, (more, who) in ways.items():
        for dtype in ("bf16", "fp32"):
            request = {"shape": "134M", "dtype": dtype, "prompt": 32, "new": 128} | more
            faster = {"tt int8": {"int8": True}, "tt compiled": {"compile": True}}
            labels = of(*who) | (faster if (name, dtype) == ("batch 1", "bf16") else {})
            # in bf16 two next tokens may be equally likely, and the texts part ways
            tolerance = 0.0 if dtype == "fp32" else float("inf")
            cells.append(Cell(name=f"134M {name}, {dtype}", workload="decode", request=request, contestants=labels,
                              tolerance=tolerance))  # fmt: skip
    return cells


def evaluation() -> list[Cell]:
    base = {"shape": "10.5M", "dtype": "fp32", "rows": 100, "batch": 8}
    return [
        Cell(name=task, workload="evaluate", request=base | {"task": task}, contestants=of("tt", "transformers"),
             unit="rows", inputs=("model", "tasks"), tolerance=0.001)
        for task in ("choices", "letters", "rolling", "answers")
    ]  # fmt: skip


def startup() -> list[Cell]:
    """Commands; their CPU seconds are those of the whole process and its children."""
    model = ["model.path={folder}", "data.train={rows_file}", "max_steps=1", "data.max_seq_len=512", "batch_size=2"]
    own = ["-o", "{scratch}/run"]
    cells: dict[str, dict[str, list[str]]] = {
        "help": {
            "tt": ["tt", "--help"], "trl": ["trl", "--help"], "trl sft": ["trl", "sft", "--help"],
            "transformers": ["transformers", "--help"], "torchtune": ["tune", "ls"], "litgpt": ["litgpt", "--help"],
        },
        "import": {
            "tt": ["python", "-c", "import tt_models, tt_peft, tt_data, tt_ckpt, tt_train"],
            "transformers": ["python", "-c", "from transformers import AutoModelForCausalLM, Trainer"],
            "trl": ["python", "-c", "from trl import SFTTrainer"],
            "torchtune": ["python", "-c", "import torchtune, torchtune.models.llama3"],
            "litgpt": ["python", "-c", "import litgpt"],
            "limits": ["python", "-c", "import torch"],
        },
        "a run of one step": {
            "tt": ["tt", "run", "sft", *model, "micro_batch_size=2", "samples.num=0", *own],
            "trl": ["trl", "sft", "--model_name_or_path", "{folder}", "--dataset_name", "{rows_folder}", "--max_steps",
                    "1", "--use_cpu", "--bf16", "false", "--max_length", "512", "--per_device_train_batch_size", "2",
                    "--report_to", "none", "--output_dir", "{scratch}/trl"],
            "limits": ["python", "-c", "import torch"],
        },
        "tt validate": {"tt": ["tt", "validate", "sft", *model], "limits": ["python", "-c", "import torch"]},
        "tt data show": {"tt": ["tt", "data", "show", "{rows_file}", "--tokenizer", "{folder}", "-n", "2"]},
        "tt ls": {"tt": ["tt", "ls"]},
        "tt quickstart": {"tt": ["tt", "quickstart", "-o", "{scratch}/quickstart"]},
    }  # fmt: skip
    request = {"shape": "tiny", "dtype": "bf16", "kind": "chats", "rows": 64}
    return [Cell(name=name, workload="command", request=request, unit="starts", inputs=("model", "rows"),
                 contestants={label: {"command": words} for label, words in who.items()})
            for name, who in cells.items()]  # fmt: skip


def memory() -> list[Cell]:
    """What each way to save memory saves, and a QLoRA of 1.1B: read MB, not the rate."""
    base = {"shape": "42M", "method": "full", "dtype": "fp32", "batch": 4, "length": 512, "steps": 2}
    ways: dict[str, dict[str, Any]] = {
        "tt": {}, "tt checkpointing: full": {"checkpointing": "full"}, "tt checkpointing: 2": {"checkpointing": 2},
        "tt checkpointing: selective": {"checkpointing": "selective"}, "tt in_backward": {"in_backward": True},
        "tt adamw8bit": {"optimizer": "adamw8bit"}, "tt adamw4bit": {"optimizer": "adamw4bit"},
        "tt full, in_backward": {"checkpointing": "full", "in_backward": True},
        "tt full, adamw8bit, in_backward": {"checkpointing": "full", "optimizer": "adamw8bit", "in_backward": True},
    }  # fmt: skip
    cells = [Cell(name="42M fp32", workload="train", request=base, contestants=ways)]
    base = {"shape": "1.1B", "dtype": "bf16", "batch": 1, "length": 128, "steps": 2, "checkpointing": "full"}
    for method in ("lora", "qlora"):
        cells.append(Cell(name=f"1.1B {method}", workload="train", request=base | {"method": method},
                          contestants=of("tt", "transformers")))  # fmt: skip
    return cells


def layer() -> list[Cell]:
    """One linear layer, forward and backward."""
    lora = {"tt": {}, "tt plain": {"plain": True}, "transformers": {}, "limits": {}}
    nf4 = {"tt": {}, "tt with torchao": {"torchao": True}, "transformers": {}, "limits": {}}
    return [
        Cell(name=f"{kind} {n_in} x {n_out}, {rows} rows", workload="layer", unit="passes", inputs=(),
             request={"kind": kind, "dtype": "bf16", "inputs": n_in, "outputs": n_out, "rows": rows, "repeats": 5},
             contestants=who)
        for kind, who in (("lora", lora), ("nf4", nf4))
        for n_in, n_out in ((1024, 1024), (2048, 5632), (4096, 4096)) for rows in (1, 64, 512, 2048)
    ]  # fmt: skip


def gpu() -> list[Cell]:
    """torchtune's published ladder, each row added to the one before, and figures that others published on an H100."""
    base = {"shape": "Llama-3.2-3B", "method": "full", "dtype": "bf16", "batch": 2, "length": 4096, "steps": 10,
            "device": "cuda", "rank": 8}  # fmt: skip
    ladder: list[tuple[str, dict[str, Any]]] = [
        ("baseline", {}), ("packed", {"document": 512}), ("compile", {"compile": True}),
        ("activation checkpointing", {"checkpointing": "full"}), ("optimizer in backward", {"in_backward": True}),
        ("activation offloading", {"offloading": True}), ("8-bit AdamW", {"optimizer": "adamw8bit"}),
        ("LoRA", {"method": "lora", "in_backward": False, "optimizer": None, "dtype": "mixed"}),
        ("QLoRA", {"method": "qlora"}),
    ]  # fmt: skip
    cells, request = [], base
    for name, more in ladder:
        request = request | more
        peer = ("transformers",) if name in ("baseline", "LoRA", "QLoRA") else ()
        cells.append(Cell(name=f"3B {name}", workload="train", request=request, contestants=of("tt", *peer)))
    large = base | {"shape": "Llama-3.1-8B", "method": "lora", "rank": 16}
    packed, pairs = large | {"compile": True, "document": 512}, {"kind": "pairs", "rows": 256, "longest": 2048}
    return [
        *cells,
        Cell(name="8B LoRA r16", workload="train", request=large, contestants=of("tt", "transformers")),
        Cell(name="8B LoRA r16, compile, packed", workload="train", request=packed, contestants=of("tt")),
        Cell(name="8B DPO packed", workload="dpo", request=large | pairs, contestants=of("tt"),
             inputs=("model", "rows")),
    ]  # fmt: skip


SUITES = {
    "cpu": lambda: [*training(), *growth(), *instructions()], "data": data, "ckpt": ckpt, "loss": loss,
    "decode": decode, "startup": startup, "eval": evaluation, "memory": memory, "layer": layer, "gpu": gpu,
}  # fmt: skip
QUICK: dict[str, Any] = {
    "shape": "tiny", "length": 64, "steps": 2, "rows": 24, "document": 16, "window": 16, "positions": 64, "width": 64,
    "vocabulary": 512, "prompt": 8, "new": 8, "longest": 64, "inputs": 128, "outputs": 128,
}  # fmt: skip


def cells_of(suite: str, *, quick: bool) -> list[Cell]:
    """The cells of a suite; ``quick`` makes what is large small, so that only the harness is tried."""
    cells: list[Cell] = SUITES[suite]()
    if not quick:
        return cells
    return [Cell(**{**vars(cell), "request": cell.request | {key: value for key, value in QUICK.items()
                                                             if cell.request.get(key)}}) for cell in cells]  # fmt: skip
