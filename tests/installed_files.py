"""Run in a wheel's environment: the package comes from the wheel, whole, and requires no more than it may."""

import importlib
import importlib.metadata
import pkgutil
import re
import sys
from pathlib import Path

MOST = {"tt-models": 0, "tt-cli": 44}  # distributions beyond those that torch itself requires

package, repository = sys.argv[1], Path(sys.argv[2])
name = package.replace("-", "_")
module = importlib.import_module(name)
folder = Path(module.__file__ or "").parent


def _ignored(path: Path) -> bool:
    return any(part == "__pycache__" or part.startswith(".") for part in path.relative_to(repository).parts)


def _required(distribution: str, found: set[str]) -> set[str]:
    """The installed distributions that ``distribution`` requires, its extras aside, and what those require."""
    for line in importlib.metadata.requires(distribution) or []:
        name = re.sub(r"[-_.]+", "-", (re.match(r"[\w.-]+", line) or [""])[0]).lower()
        if name in found or ("extra ==" in line and "report" not in line):  # tt-cli asks for tt-train[report]
            continue
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # of another system or Python
            continue
        found.add(name)
        _required(name, found)
    return found


problems = []
if folder.is_relative_to(repository / "packages"):
    problems.append(f"{name} was imported from the working tree, {folder}")
if not (folder / "py.typed").is_file():
    problems.append("py.typed is not in the wheel")
files = [str(file) for file in importlib.metadata.files(package) or []]
if not any(file.endswith("licenses/LICENSE") for file in files):
    problems.append("LICENSE is not in the wheel")
sources = repository / "packages" / package / "src"
expected = {str(path.relative_to(sources)) for path in sources.rglob("*") if path.is_file() and not _ignored(path)}
if missing := expected - set(files):
    problems.append(f"not in the wheel: {', '.join(sorted(missing))}")
if module.__version__ != importlib.metadata.version(package):
    problems.append(f"__version__ {module.__version__} is not the wheel's {importlib.metadata.version(package)}")
optional = {
    re.split(r"[^\w.-]", line)[0].replace("-", "_").lower()
    for line in importlib.metadata.requires(package) or [] if "extra ==" in line
}  # fmt: skip
for found in pkgutil.walk_packages(module.__path__, f"{name}."):
    try:
        importlib.import_module(found.name)
    except ImportError as error:
        if (error.name or "").partition(".")[0] in optional:  # the plug-in of an extra
            continue
        problems.append(f"{found.name} does not import with what {package} declares: {error}")
beyond = {one for one in _required(package, set()) - _required("torch", {"torch"}) if not one.startswith("tt-")}
if len(beyond) > MOST.get(package, 99):
    problems.append(f"{package} requires {len(beyond)} distributions beyond torch's: {', '.join(sorted(beyond))}")
if problems:
    sys.exit("\n".join(problems))
print(f"{package}: {len(expected)} files, every module imports; {len(beyond)} requirements beyond torch's")
