"""Run with tt-models and what it declares installed: `import tt_models` loads torch and nothing else third-party."""

import importlib.metadata
import sys


def third_party() -> set[str]:
    tops = {name.partition(".")[0] for name, module in sys.modules.items() if module is not None}
    owned = importlib.metadata.packages_distributions()
    return {top for top in tops if top in owned}


import torch  # noqa: E402  (what torch itself loads does not count)

before = third_party()
import tt_models  # noqa: E402

new = third_party() - before - {"tt_models"}
if new:
    sys.exit(f"import tt_models loads {', '.join(sorted(new))}; a leaf named tt-models loads torch alone")
print(f"tt_models {tt_models.__version__} loads torch {torch.__version__} and nothing else")
