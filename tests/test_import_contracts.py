"""Who may import whom, read from the source: nothing is imported here, and conditional imports count too."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEAVES = ("tt_models", "tt_peft", "tt_data", "tt_ckpt")
PACKAGES = (*LEAVES, "tt_train", "tt_cli")

# Modules of tt_train outside recipes/ that may know more than one leaf. Everything else works on tensors and dicts.
ASSEMBLY = {
    "build": "the model with its weights and adapter",
    "inputs.model": "the model and adapter of a config, before weights load",
    "job": "what a config names: tokenizer, rows and model",
    "references.reference": "what a policy is compared with: the model without its adapter, or a frozen copy",
    "run.finish": "the result of a run: adapter or model, with what is beside it",
    "models.export": "a Modelfile from the tokenizer and the config",
    "models.gguf": "a GGUF file of the merged weights, with the tokenizer and the config",
    "inputs.methods": "a teacher's weights and tokenizer; layers that are to be rounded",
    "models.plan": "what a run of the model on its rows will need",
    "models.trace": "the model's kernels on shapes, 4-bit layers among them",
    "references.reference_cache": "log-probabilities of rows, kept as tensors",
    "evaluate": "held-out loss and samples: batches in, generation out",
    "run.exact_match": "answers compared: generation out, text of it",
    "evals.answer": "generation out, text of it",
    "evals.score": "a model asked in batches: its tokenizer, its weights",
    "evals.harness": "lm-eval's model: text in, text out",
    "evals.models": "models and rows side by side",
    "models.load": "tt_train.load",
    "models.merge": "tt_train.merge_run",
    "models.quality": "a model before and after quantization: rows in, generation out",
    "models.quantize": "tt_train.quantize_run",
    "models.quantization_plan": "which layers of a model are quantized",
    "models.origin": "where the base of an adapter is, and whether its files are read as they are",
    "models.verify": "a certificate: what the weights give here and in transformers",
    "run.serving": "the files of a tokenizer beside the weights, and whether they have changed",
    "run.checkpoints": "training state: optimizer, adapter and data position",
}
# Imports that a module makes for itself, inside a function, where the user asked for it by name.
OPTIONAL: dict[str, set[str]] = {
    "tt_models": {"transformers"},  # tt_models.parity compares with it
    "tt_data": {"tiktoken", "zstandard", "compression"},  # compression.zstd of Python 3.14, zstandard before it
    "tt_ckpt": {"gguf"},  # of its extra
    "tt_cli": {"packaging", "huggingface_hub"},  # of tt env, which looks at what tt-ckpt and tt-data bring
    "tt_train": {"wandb", "tensorboard", "trackio", "mlflow", "comet_ml", "matplotlib",  # matplotlib of its extra
                 "lm_eval", "tqdm", "numpy"},  # of its extra eval
}  # fmt: skip
# Modules that an optional library imports, or whoever has checked that it is there: they may begin with it.
PLUGINS = {"tt_train.evals.harness": {"lm_eval", "tqdm"}}


# Floors of a package, from the ground up: a wing (or a module beside the wings) knows only what is on a floor below it.
FLOORS: dict[str, tuple[tuple[str, ...], ...]] = {
    "tt_models": (
        ("shown", "cpu", "masks", "sampling", "limits"),
        ("norm", "mlp", "rope"),
        ("config_keys", "config"),
        ("kv_cache", "attention", "decoder"),
        ("llama", "moe", "prompts", "generate", "parity"),
        ("families",),
        ("auto",),
    ),
    "tt_peft": (
        ("shown", "nf4", "product", "expressions", "names", "config"),
        ("lowrank", "nf4_linear", "lora", "stacked", "full_modules", "dora", "switch", "modules"),
        ("merge", "quantize", "apply"),
        ("adapter_files",),
    ),
    "tt_ckpt": (
        ("shown", "redaction", "files", "safe_names", "safetensors_file", "mapped_file", "commit", "ranks"),
        ("hub", "train"),
        ("model_path",),
        ("hf",),
        ("formats",),
    ),
    "tt_cli": (
        ("names", "terminal", "marking", "console", "screen", "completion", "group", "options"),
        ("torchrun_words",),
        ("prompts", "reply", "talk"),
        ("errors", "quickstart"),
        ("agent",),
        ("check",),
        ("verbs",),
        ("main", "__main__"),
    ),
    "tt_data": (
        ("wording",),
        ("files", "messages", "processes"),
        ("examples", "template"),
        ("report", "text"),
        ("rows", "token_rows"),
        ("encoding", "show"),
        ("stream",),
        ("batching", "loading"),
    ),
    "tt_train": (
        ("config", "errors", "losses"),
        ("memory", "quantized", "settings"),
        ("devices", "records"),
        ("optim", "report"),
        ("inputs", "step"),
        ("evaluate", "job"),
        ("references",),
        ("build", "run"),
        ("models", "recipes"),
        ("evals",),
    ),
}


def modules(package: str) -> Iterator[tuple[str, ast.Module]]:
    """Dotted name and syntax tree of every module of a package."""
    source = ROOT / "packages" / package.replace("_", "-") / "src"
    for path in sorted((source / package).rglob("*.py")):
        name = ".".join(path.relative_to(source).with_suffix("").parts).removesuffix(".__init__")
        yield name, ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.AST, *, at_import_time: bool = False) -> set[str]:
    """Dotted names that a module imports, wherever it does; with ``at_import_time`` only those that run on import."""
    found: set[str] = set()
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if at_import_time and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if at_import_time and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute in this repository"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module"):
            found |= {word.value for word in node.args[:1] if isinstance(word, ast.Constant)}
        todo.extend(ast.iter_child_nodes(node))
    return found


def tops(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_leaf_knows_no_sibling(leaf):
    for name, tree in modules(leaf):
        assert not tops(imported(tree)) & (set(PACKAGES) - {leaf}), f"{name} imports a sibling"


def test_training_does_not_know_the_command_line():
    for name, tree in modules("tt_train"):
        assert "tt_cli" not in tops(imported(tree)), f"{name} imports tt_cli"


def test_only_recipes_and_assembly_join_the_leaves():
    for name, tree in modules("tt_train"):
        if not name.startswith("tt_train.recipes") and name.removeprefix("tt_train.") not in ASSEMBLY:
            known = tops(imported(tree)) & set(LEAVES)
            assert len(known) <= 1, f"{name} joins {sorted(known)}: that is for a recipe, or for ASSEMBLY with a reason"


def test_the_list_of_assembly_modules_is_no_longer_than_it_must_be():
    joining = {
        name.removeprefix("tt_train.")
        for name, tree in modules("tt_train")
        if len(tops(imported(tree)) & set(LEAVES)) > 1
    }
    assert set(ASSEMBLY) <= joining


def test_a_copied_recipe_imports_public_modules_only():
    """``tt cp sft mine.py`` hands the recipe over: what it imports must be there for others, too."""
    recipes = {name: tree for name, tree in modules("tt_train") if name.startswith("tt_train.recipes")}
    assert "tt_train.recipes.sft" in recipes
    for name, tree in recipes.items():
        private = [word for word in imported(tree) if any(part.startswith("_") for part in word.split("."))]
        assert not private, f"{name} imports {private}"


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_imports_one_that_needs_it(package):
    """No circle of imports, not even through an import inside a function."""
    trees = dict(modules(package))
    left = {name: imported(tree) & trees.keys() - {name, package} for name, tree in trees.items() if name != package}
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"these files import each other: {sorted(left)}"


@pytest.mark.parametrize("package", FLOORS)
def test_a_wing_knows_only_the_floors_below_it(package):
    floor_of = {part: number for number, floor in enumerate(FLOORS[package]) for part in floor}
    trees = dict(modules(package))
    known = {name.split(".")[1] for name in trees if name != package}
    assert known == set(floor_of), "a wing or module without a floor, or a floor without one"
    for name, tree in trees.items():
        if name == package:
            continue
        part = name.split(".")[1]
        for other in {found.split(".")[1] for found in imported(tree) & trees.keys() - {package}} - {part}:
            below = floor_of[other] < floor_of[part]
            beside = floor_of[other] == floor_of[part] and f"{package}.{part}" in trees and part != other
            is_wing = any(found.startswith(f"{package}.{other}.") for found in trees)
            assert below or (beside and not is_wing), f"{name} imports {other}, which is not on a floor below it"


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_imported_is_declared(package):
    project = tomllib.loads((ROOT / "packages" / package.replace("_", "-") / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[<>=!~;\[ ]", line)[0].lower().replace("-", "_") for line in project["dependencies"]}
    declared |= {"yaml"} if "pyyaml" in declared else set()
    if package == "tt_cli":
        declared |= set(LEAVES) | {"torch", "omegaconf", "yaml", "tokenizers"}  # tt-train's and its leaves'
    allowed = declared | OPTIONAL.get(package, set()) | sys.stdlib_module_names | {package}
    for name, tree in modules(package):
        unknown = tops(imported(tree)) - allowed
        assert not unknown, f"{name} imports {sorted(unknown)}, which {project['name']} does not declare"


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_optional_is_imported_where_it_is_used(package):
    for name, tree in modules(package):
        early = tops(imported(tree, at_import_time=True)) & OPTIONAL.get(package, set()) - PLUGINS.get(name, set())
        assert not imported(tree, at_import_time=True) & PLUGINS.keys(), f"{name} imports a plug-in"
        assert not early, f"{name} imports {sorted(early)} when it is imported itself"


@pytest.mark.parametrize("package", PACKAGES)
def test_torchao_has_one_door(package):
    doors = [name for name, tree in modules(package) if "torchao" in tops(imported(tree))]
    assert len(doors) <= (package in ("tt_peft", "tt_train")), f"torchao is imported by {doors}"


def test_nothing_heavy_is_loaded_with_the_command_line():
    heavy = {"torch", "transformers", "datasets", "omegaconf", "matplotlib", *LEAVES}
    light = {"tt_cli", "tt_cli.main", "tt_train", "tt_train.settings.registry", "tt_train.errors", "tt_train.report"}
    found = {
        name: tops(imported(tree, at_import_time=True)) & heavy
        for package in ("tt_cli", "tt_train")
        for name, tree in modules(package)
    }
    assert {name: found[name] for name in light if found[name]} == {}


READERS_OF_PICKLES = {
    "tt_ckpt.formats.pickles": "the one door for .bin and .pth files, behind --allow-pickle",
}


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_can_run_code_from_a_file(package):
    """Security rules S1, S6 and S12 (SECURITY.md), beside what ruff's S rules see."""
    modules_of_pickles = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    calls = {"eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"}
    calls |= {"torch.load", "numpy.load", "np.load", "pickle.load", "pickle.loads"}
    for name, tree in modules(package):
        made = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) in calls]
        if name in READERS_OF_PICKLES:
            assert all(ast.unparse(node.func) == "torch.load" for node in made), f"{name}: {map(ast.unparse, made)}"
            assert all("weights_only=True" in ast.unparse(node) for node in made), f"{name} unpickles objects"
            continue
        assert not tops(imported(tree)) & modules_of_pickles, f"{name} imports a pickle reader"
        assert [ast.unparse(node) for node in made if not _is_safe_yaml(node, tree)] == [], name


# Python itself, by its full path, with nothing of the working folder or (-I) of the environment on its path
STARTS_PROGRAMS = {
    "tt_data.template.chat_template": "the processes that render templates and try a tokenizer's files",
    "tt_peft.expressions": "the process that matches expressions of files",
}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_program_but_python_is_started(package):
    """A program of the folder one stands in, or one that a repository's config names, is never run (S12)."""
    for name, tree in modules(package):
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        starts = {call for call in calls if re.match(r"os\.(system|popen|exec|spawn|posix_spawn|startfile)", call)}
        starts |= {call for call in calls if call in ("platform.platform", "platform.processor", "platform.uname")}
        starts |= imported(tree) & {"subprocess", "pty", "webbrowser", "pdb"}  # platform.platform runs uname
        lists = [node for node in ast.walk(tree) if isinstance(node, ast.List)]
        starters = [ast.unparse(node) for node in lists if "sys.executable" in ast.unparse(node)]
        assert not starts or name in STARTS_PROGRAMS, f"{name}: {sorted(starts)}"
        assert all(re.match(r"\[sys\.executable, '-(I|P)'", one) for one in starters), f"{name}: {starters}"
        assert len(starters) == (name in STARTS_PROGRAMS), f"{name}: {starters}"


def _is_safe_yaml(call: ast.Call, tree: ast.Module) -> bool:
    """``yaml.load`` with a loader that this module derives from SafeLoader."""
    loaders = {
        node.name for node in tree.body
        if isinstance(node, ast.ClassDef) and [ast.unparse(base) for base in node.bases] == ["yaml.SafeLoader"]
    }  # fmt: skip
    given = [ast.unparse(word) for word in [*call.args[1:], *(keyword.value for keyword in call.keywords)]]
    return ast.unparse(call.func) == "yaml.load" and len(given) == 1 and given[0] in loaders | {"yaml.SafeLoader"}
