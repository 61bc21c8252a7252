"""Run in a wheel's environment: the package comes from the wheel, with its marker, licence and every module."""

import importlib
import importlib.metadata
import pkgutil
import sys
from pathlib import Path

package, repository = sys.argv[1], Path(sys.argv[2])
name = package.replace("-", "_")
module = importlib.import_module(name)
folder = Path(module.__file__ or "").parent


def _ignored(path: Path) -> bool:
    return any(part == "__pycache__" or part.startswith(".") for part in path.relative_to(repository).parts)


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
for found in pkgutil.walk_packages(module.__path__, f"{name}."):
    try:
        importlib.import_module(found.name)
    except ImportError as error:
        problems.append(f"{found.name} does not import with what {package} declares: {error}")
if problems:
    sys.exit("\n".join(problems))
print(f"{package}: {len(expected)} files, every module imports")
