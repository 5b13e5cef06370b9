"""Curves of runs, from their folders."""

import math
import sys

from pfppo.config import UserError
from pfppo.lab import figures

import numpy as np
import pytest
from ranks import refused
from running import write_rows

try:
    import matplotlib as MATPLOTLIB
except ImportError:
    MATPLOTLIB = None

ROWS = [
    {"step": 1, "reward_all": 0.5, "kl_k1": math.nan, "score_all": None, "kept": 0.4},
    {"step": 2, "reward_all": 9.0, "validation": 0.25},
    {"step": 2, "reward_all": 0.75, "validation": 0.5, "kl_kept": "much"},  # resumed: counts
]


def run_folder(folder, rows, more=""):
    folder.mkdir(parents=True)
    path = write_rows(folder / "metrics.jsonl", rows)
    path.write_text(path.read_text() + more)
    return str(folder)


def draw(monkeypatch, folders, out=""):
    """figures.main; the figure that it saved."""
    if MATPLOTLIB is None:
        pytest.skip("matplotlib is not installed")
    monkeypatch.setitem(sys.modules, "matplotlib", MATPLOTLIB)
    from matplotlib.figure import Figure

    saved, savefig = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda f, *a, **o: saved.append(f) or savefig(f, *a, **o)
    )
    figures.main(figures.Args(str(out)), folders)
    return saved[0]


def test_a_run_is_read_without_what_is_missing_and_what_a_kill_cut_short(tmp_path):
    kind, curves = figures.read_run(run_folder(tmp_path / "run", ROWS, '{"step": 3, "rewa'))
    assert kind is figures.PPO
    known = {name: [part.tolist() for part in curve] for name, curve in curves.items()}
    assert known == {"reward_all": [[1, 2], [0.5, 0.75]], "validation": [[2], [0.5]]}


def test_curves_of_a_run_go_into_its_folder_and_say_what_has_no_values(
    tmp_path, monkeypatch, capsys
):
    figure = draw(monkeypatch, [run_folder(tmp_path / "run", ROWS)])
    assert (tmp_path / "run/curves.png").read_bytes()[:4] == b"\x89PNG"
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["reward (sd of the SFT policy's samples)", "validation: greedy pass@1"]
    said = capsys.readouterr().out
    assert f"{tmp_path / 'run/curves.png'}; no values of: score: share that" in said


def test_curves_of_several_runs_have_a_color_each_a_style_for_what_is_kept_and_a_legend(
    tmp_path, monkeypatch
):
    rows = [{"step": i, "reward_all": i % 5, "reward_kept": 1 + i % 5} for i in range(1, 61)]
    folders = [run_folder(tmp_path / name / "same", rows) for name in ("a", "b")]
    folders.append(run_folder(tmp_path / "c", rows[:1]))
    figure = draw(monkeypatch, folders, tmp_path / "new" / "all")
    assert (tmp_path / "new/all.png").exists()
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == [*folders[:2], "c"]
    (axis,) = figure.axes
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["all", "kept"]
    lines = [
        line for line in axis.get_lines() if line.get_alpha() is None and len(line.get_xdata())
    ]
    assert [line.get_linestyle() for line in lines] == ["-", "--"] * 3
    assert len({tuple(line.get_color()) for line in lines}) == 3
    means = lines[0].get_ydata()  # of 5 steps: 1, 2, 3, 4, 0
    assert means[4:].tolist() == pytest.approx([2] * 56) and means[0] == 1


def test_held_out_numbers_of_a_reward_model_stand_where_they_were_measured(tmp_path, monkeypatch):
    unseen = {10: 0.5, 20: 0.25}
    rows = [{"step": i, "loss": 1 / i, "held_out_loss": unseen.get(i)} for i in range(1, 25)]
    (axis,) = draw(monkeypatch, [run_folder(tmp_path / "rm", rows)]).axes
    assert axis.get_title() == "loss (nats per pair)"
    held_out = next(line for line in axis.get_lines() if line.get_marker() == "o")
    assert dict(zip(*held_out.get_data(), strict=True)) == unseen


@pytest.mark.parametrize(
    "text, said",
    [
        (None, "not the folder of a run, it has no metrics.jsonl"),
        ("", "metrics.jsonl: no step is in it yet"),
        ("{}\n", "metrics.jsonl, line 1: damaged, expected an object with a step"),
        ('{"step": 1}\nx\n', "metrics.jsonl, line 2: damaged, expected a JSON object"),
        ('{"step": 1, "loss": NaN}\n', "no metrics of train_ppo.py or train_rm.py in it"),
        ('{"step": 1, "loss": 1}\n', "matplotlib: pip install matplotlib"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(tmp_path, monkeypatch, text, said):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "run").mkdir()
    if text is not None:
        (tmp_path / "run/metrics.jsonl").write_text(text)
    folders = [str(tmp_path / "run")]
    assert refused(figures.main, figures.Args(), folders).endswith(said)
    assert "no such folder" in refused(figures.main, figures.Args(), [str(tmp_path / "none")])


def test_a_wrong_command_line_of_curves_is_one_line(tmp_path, monkeypatch):
    ppo, rm = (run_folder(tmp_path / n, [{"step": 1, n: 1}]) for n in ("reward_all", "loss"))
    for folders, out, said in (
        ([], "", "no RUN, expected folders of runs"),
        ([ppo, ppo], "", "2 runs: expected --out FILE"),
        ([ppo, rm], "x.png", "a run of PPO and a reward model's training, draw them apart"),
        ([ppo], f"{ppo}/metrics.jsonl/x.png", "metrics.jsonl is a file, expected a folder"),
    ):
        assert said in refused(figures.main, figures.Args(out), folders)
    with pytest.raises(UserError, match="--out .*x.xyz: .*'xyz' is not supported"):
        draw(monkeypatch, [ppo], tmp_path / "x.xyz")


def test_folders_and_options_stand_in_any_order():
    for words in ("a b --out f", "--out f a b", "a --out f b"):
        assert figures.split_words(words.split()) == (["a", "b"], ["--out", "f"])
    assert figures.split_words(["--out=f", "a", "--help"]) == (["a"], ["--out=f", "--help"])


def test_a_band_is_mean_and_95_percent_of_the_mean_where_all_seeds_have_a_value():
    runs = [{"samples": [10, 20, 30], "validation": [None, 0.5, 0.7]}]
    runs += [runs[0] | {"validation": [0.1, 0.7, 0.9]}]
    at, mean, low, high = figures._band(runs, "samples", "validation")
    assert at.tolist() == [20, 30] and mean == pytest.approx([0.6, 0.8])
    half = 12.7062 * np.std([0.5, 0.7], ddof=1) / 2**0.5  # t of one degree of freedom
    assert high - mean == pytest.approx([half] * 2, rel=1e-5)
    assert mean - low == pytest.approx([half] * 2, rel=1e-5)
