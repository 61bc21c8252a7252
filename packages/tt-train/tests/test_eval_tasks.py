"""Tasks of lm-evaluation-harness over local rows: tt's model and lm-eval's hf give the same figures."""

import json
import random

import pytest

from tt_train import ConfigError

pytest.importorskip("lm_eval")

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu".split()
METRIC = "  - {{metric: {}, aggregation: {}, higher_is_better: {}}}\n"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Multiple choice, perplexity and generation, a group of the first two, and one that would run code."""
    folder, rng = tmp_path_factory.mktemp("tasks"), random.Random(0)

    def text(number):
        return " ".join(rng.choice(WORDS) for _ in range(number))

    def add(name, rows, lines, metrics):
        rows = [json.dumps(row) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
        data = (
            f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / name}.jsonl}}}}\ntest_split: test\n"
        )
        metrics = "metric_list:\n" + "".join(METRIC.format(*metric) for metric in metrics)
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{data}{lines}{metrics}metadata: {{version: 1.5}}\n")

    choices = [
        {"q": text(rng.choice((3, 8, 150))), "c": [text(2), text(1), text(3)], "a": rng.randrange(3)} for _ in range(20)
    ]
    add("made_choice", choices, "output_type: multiple_choice\ndoc_to_text: 'say {{q}}:'\ndoc_to_target: a\n"
        "doc_to_choice: c\nfewshot_split: test\n", [("acc", "mean", "true"), ("acc_norm", "mean", "true")])  # fmt: skip
    add("made_text", [{"t": text(number)} for number in (2, 40, 127, 128, 400)],
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{t}}'\n",
        [("word_perplexity", "weighted_perplexity", "false"), ("bits_per_byte", "bits_per_byte", "false")])  # fmt: skip
    add("made_answer", [{"q": text(number), "a": text(1)} for number in (3, 9, 4, 5, 150)],
        "output_type: generate_until\ndoc_to_text: 'say {{q}}'\ndoc_to_target: '{{a}}'\n"
        "generation_kwargs: {until: ['t'], max_gen_toks: 12}\nnum_fewshot: 0\n",
        [("exact_match", "mean", "true")])  # fmt: skip
    add("made_code", [{"q": "a", "a": "b"}], "output_type: generate_until\ndoc_to_text: q\ndoc_to_target: a\n"
        "unsafe_code: true\n", [("exact_match", "mean", "true")])  # fmt: skip
    (folder / "made_hub.yaml").write_text(
        "task: made_hub\ndataset_path: nobody/no-such-rows\ntest_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: q\ndoc_to_target: a\n"
    )
    (folder / "made_group.yaml").write_text(
        "group: made_group\ntask: [made_choice, made_text]\nmetadata: {version: 2}\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    return folder


def settings(tasks, *names, **more):
    from tt_train.evals.tasks import Settings

    return Settings(tasks=names, include_path=(tasks,), **more)


def run(models, settings, **options):
    from tt_train.evals.models import on_tasks
    from tt_train.evals.score import ModelOptions

    told = []
    return on_tasks(
        [str(model) for model in models], settings, ModelOptions(device="cpu", **options), tell=told.append
    ), told


@pytest.mark.parametrize("more", [{}, {"num_fewshot": 2, "limit": 7}, {"apply_chat_template": True, "num_fewshot": 1}],
                         ids=["plain", "few-shot", "chat"])  # fmt: skip
def test_figures_equal_those_of_hf(model_dir, tasks, more, monkeypatch):
    pytest.importorskip("transformers")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda *_: None)  # starts pip
    [report], _ = run([model_dir], settings(tasks, "made_choice", "made_text", "made_answer", log_samples=True, **more))
    raw = lm_eval.simple_evaluate(
        HFLM(str(model_dir), device="cpu", dtype="float32", batch_size=4),
        tasks=["made_choice", "made_text", "made_answer"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False), **more,
    )  # fmt: skip
    ours = {(one.task, f"{one.metric},{one.filter}"): one for one in report.figures}
    theirs = {(task, key): value for task, values in raw["results"].items() for key, value in values.items()
              if "," in key and "_stderr" not in key}  # fmt: skip
    assert ours.keys() == theirs.keys()
    for (task, key), value in theirs.items():
        found, error = ours[task, key], raw["results"][task][key.replace(",", "_stderr,")]
        assert found.value == pytest.approx(value, rel=1e-4)
        assert found.stderr == (None if error == "N/A" else pytest.approx(error, rel=1e-3))
        assert (found.version, found.num_fewshot) == (1.5, raw["n-shot"][task])
    answers = {(row["task"], row["doc_id"]): row["resps"] for row in report.samples if row["task"] == "made_answer"}
    assert answers == {("made_answer", row["doc_id"]): row["resps"] for row in raw["samples"]["made_answer"]}


def test_several_models_are_side_by_side_and_each_run_keeps_its_results(model_dir, words, tasks, tmp_path):
    from tt_train import compose
    from tt_train.evals.models import write
    from tt_train.evals.results import table
    from tt_train.evals.score import ModelOptions
    from tt_train.recipes import sft
    from tt_train.report import write_report

    trained = sft.main(
        compose("sft", overrides=[*words, "adapter.rank=4", "max_steps=2", f"output_dir={tmp_path / 'run'}"])
    )
    reports, _ = run([model_dir, trained], settings(tasks, "made_group", limit=5))
    cells = table({report.model: report.figures for report in reports})
    assert cells[0] == ["task", "version", "n-shot", "rows", "metric", str(model_dir), str(trained)]
    assert [row[0] for row in cells[1:]] == ["made_choice", "made_choice", "made_text", "made_text", "made_group"]
    assert cells[1][-2] != "" != cells[1][-1]
    assert cells[3][-2] != cells[3][-1]
    [file] = write(reports, ModelOptions(), None, samples=False)
    assert file.parent == trained / "evals"
    saved = json.loads(file.read_text())
    assert {row["model"] for row in saved["results"]} == {str(trained)}
    assert saved["models"][str(trained)]["lm_eval"]["versions"]["made_choice"] == 1.5
    html = write_report([trained])[0].read_text()
    for figure in reports[1].figures:
        assert f'<th scope="row">{figure.task}</th><td>{figure.metric}</td><td>{figure.value:.4f}' in html


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["made_choise"], "there is no task 'made_choise'; did you mean 'made_choice'?"),
        (
            ["tasks/mine.yaml"],
            "no task 'tasks/mine.yaml'; give the name in the file, and its folder: --include-path tasks",
        ),
        (["made_code"], "task made_code: it runs code that the model writes; .* --confirm-run-unsafe-code"),
        (["made_hub"], "task made_hub: its rows are not on this machine, and the hub cannot be reached: "),
    ],
)
def test_a_task_that_cannot_run_is_told_before_weights_load(model_dir, tasks, names, message, monkeypatch):
    monkeypatch.setattr("lm_eval.tasks.TaskManager.__init__", _without_defaults(monkeypatch))
    monkeypatch.setattr("tt_train.evals.score.load", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(ConfigError, match=message) as refused:
        run([model_dir], settings(tasks, *names))
    assert len(refused.value.problems) == 1


def test_a_name_in_no_task_file_is_refused_without_the_index_of_lm_evals_tasks(monkeypatch):
    from tt_train.evals.tasks import Settings, find_tasks

    monkeypatch.setattr("lm_eval.tasks.TaskManager", None)
    with pytest.raises(ConfigError, match="there is no task 'arc_esay'; did you mean 'arc_easy'?"):
        find_tasks(Settings(tasks=("arc_easy", "arc_esay")))


def _without_defaults(monkeypatch):
    """lm-eval's own 14,000 files take seconds to read."""
    from lm_eval.tasks import TaskManager

    make = TaskManager.__init__
    return lambda self, **options: make(self, **options | {"include_defaults": False})


def test_code_runs_if_that_is_confirmed(model_dir, tasks, monkeypatch):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    [report], _ = run(
        [model_dir], settings(tasks, "made_code", confirm_run_unsafe_code=True, gen_kwargs="max_gen_toks=3")
    )
    assert [figure.metric for figure in report.figures] == ["exact_match"]


def test_a_task_that_fixes_its_examples_keeps_them_and_that_is_told(model_dir, tasks):
    [report], told = run([model_dir], settings(tasks, "made_answer", num_fewshot=3))
    assert {figure.num_fewshot for figure in report.figures} == {0}
    assert told[0] == "made_answer: is always asked without solved examples, as its file says, also with --num-fewshot"


def test_a_missing_harness_is_named_with_its_pip_line(model_dir, tasks, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'lm-eval"):
        run([model_dir], settings(tasks, "made_text"))


def test_a_chat_template_that_is_not_there_is_told(model_dir, tasks, tmp_path):
    import shutil

    shutil.copytree(model_dir, tmp_path / "model", ignore=shutil.ignore_patterns("chat_template.jinja"))
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(
        json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "chat_template"})
    )
    with pytest.raises(ConfigError, match="has no chat template; leave out --apply-chat-template"):
        run([tmp_path / "model"], settings(tasks, "made_answer", apply_chat_template=True))


def test_the_harness_finds_the_model_by_its_name(model_dir, tasks):
    """As ``lm_eval --model tt --model_args path=...`` does, once the plug-in is imported."""
    from lm_eval.api.registry import get_model

    import tt_train.evals.harness

    assert get_model("tt") is tt_train.evals.harness.TT
    model = get_model("tt").create_from_arg_string(
        f"path={model_dir},max_length=64", {"device": "cpu", "batch_size": "2"}
    )
    assert (model.max_length, model.scorer.batch_size) == (64, 2)


def test_evaluations_of_a_run_at_the_same_time_keep_a_file_each(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    from tt_train.evals.results import save

    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda number: save(tmp_path, "results.json", str(number)), range(8)))
    assert sorted(path.read_text() for path in paths) == [str(number) for number in range(8)]
