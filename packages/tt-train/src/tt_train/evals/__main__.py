"""``python -m tt_train.evals ...``: the command line of lm-eval, which then knows ``--model tt``.

lm-eval 0.4.13 looks for no plug-ins; later releases find ``tt`` by its entry point, and ``lm_eval`` itself will do.
"""

from tt_train.evals.tasks import require_lm_eval


def main() -> None:
    """Run lm-eval's command with the words of this one."""
    require_lm_eval()
    from lm_eval.__main__ import cli_evaluate

    import tt_train.evals.harness  # noqa: F401  (registers the model)

    cli_evaluate()


if __name__ == "__main__":
    main()
