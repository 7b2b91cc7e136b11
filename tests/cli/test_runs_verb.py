"""`retnet runs` as a user sees it: tables on a terminal and elsewhere, two side by side, the picture, the live view."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from retnet.cli import runs as verb
from retnet.lock import sole_owner
from retnet.settings import UserError
from tests.train.test_run_summary import CONFIG, make_run


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(Path("runs/base"))
    make_run(Path("runs/faster"), done=30, config=CONFIG.replace("0.01", "0.02"))
    make_run(Path("runs/broken"), config="[train\n")
    return tmp_path


def invoke(*words):
    done = CliRunner().invoke(verb.command, [str(word) for word in words])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def on_terminal(monkeypatch, width):
    plain = Console

    def console(**options):
        return plain(**options, force_terminal=True, width=width, height=24, color_system=None)

    monkeypatch.setattr(verb, "Console", console)


def test_elsewhere_it_is_tab_separated(home):
    lines = [line.split("\t") for line in invoke().output.splitlines()]
    assert lines[0] == [
        "run",
        "state",
        "step",
        "loss",
        "bits/byte",
        "tokens/s",
        "time",
        "learning_rate",
        "note",
    ]
    assert lines[1] == ["base", "finished", "40/40", "1.250", "2.0000", "1,025", "0:00:20", "0.01", ""]
    assert lines[2][:3] == ["broken", "damaged", "40"]
    assert lines[2][-1].startswith("config.toml cannot be read")
    assert lines[3][:3] == ["faster", "stopped", "30/40"]


@pytest.mark.parametrize("width", [80, 120])
def test_on_a_terminal_no_number_is_broken(width, home, monkeypatch):
    on_terminal(monkeypatch, width)
    shown = invoke().output
    assert all(len(line) <= width for line in shown.splitlines())
    for words in (
        "3 runs in runs",
        "40/40",
        "2.0000",
        "1,025",
        "0:00:20",
        "broken is damaged: config.toml",
        "0.02",
    ):
        assert words in shown, words
    assert ("Settings that differ" in shown) == (width == 80)


def test_two_runs_side_by_side(home):
    rows = dict(line.split("\t", 1) for line in invoke("runs/faster", "runs/base").output.splitlines())
    assert rows[""] == "runs/faster\truns/base\tratio"
    assert rows["state"] == "stopped\tfinished\t–"
    assert rows["loss"] == "1.667\t1.250\t0.75"
    assert rows["loss at step 30"] == "1.6667\t1.6667\t1"
    assert rows["bits/byte at step 30"] == "3.0000\t3.0000\t1"
    assert rows["train.learning_rate"] == "0.02\t0.01\t0.5"
    for asked in ("run", "loss"):  # base first, by name and by loss
        head, *_ = invoke("runs/faster", "runs/base", "--sort", asked).output.splitlines()
        assert head == "\truns/base\truns/faster\tratio"


def test_the_mesh_is_shown_where_there_were_several_processes(home):
    line = '{"step": %d, "processes": %d, "mesh": {"replicate": 1, "shard": %d, "tp": 2, "cp": 1}}\n'
    Path("runs/faster/launches.jsonl").write_text(line % (0, 2, 1) + line % (9, 8, 4) + '{"step": 20, "proc')
    head, base, _, faster = (line.split("\t") for line in invoke().output.splitlines())
    assert [row[head.index("mesh")] for row in (base, faster)] == ["–", "shard 4 × tp 2"]
    assert "mesh\tshard 4 × tp 2\t–\t–" in invoke("runs/faster", "runs/base").output


def test_order(home):
    make_run(Path("runs/seed-10"))
    make_run(Path("runs/seed-9"))

    def order(*words):
        return [line.split("\t")[0] for line in invoke(*words).output.splitlines()[1:]]

    assert order() == ["base", "broken", "faster", "seed-9", "seed-10"]
    assert order("--sort", "loss")[-1] == "faster"
    os.utime("runs/faster/metrics.jsonl", (2e9, 2e9))
    assert order("--sort", "written")[0] == "faster"


def test_paths(home):
    assert invoke("runs/base/checkpoints").output.splitlines()[1].startswith("base\t")
    assert len(invoke("runs", home / "runs/base", ".").output.splitlines()) == 4  # each run once
    assert invoke("runs/base/metrics.jsonl").output == invoke("runs/base").output
    with pytest.raises(UserError, match="there is no folder nowhere"):
        invoke("nowhere")
    Path("empty").mkdir()
    with pytest.raises(UserError, match="there is no run in empty or below it"):
        invoke("empty")


@pytest.mark.slow
def test_many_runs_are_there_at_once(home):
    """Two hundred of 4,000 lines each, without torch."""
    lines = Path("runs/base/metrics.jsonl").read_text() * 500
    for n in range(200):
        make_run(Path(f"many/run-{n}"), config=CONFIG + f"seed = {n}\n")
        Path(f"many/run-{n}/metrics.jsonl").write_text(lines)
    code = (
        "import sys; from retnet.cli import cli; cli.main(['runs', 'many'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules"
    )
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 201
    assert time.monotonic() - begin < 10  # 1 second where nothing else works


class TestPlot:
    def test_it_is_a_picture(self, home):
        done = invoke("runs", "--plot", "curves.png")
        assert "wrote curves.png" in done.output
        assert Path("curves.png").read_bytes().startswith(b"\x89PNG")

    def test_curves_are_means_between_the_least_and_the_greatest(self, home):
        from retnet.cli.run_curves import curves
        from retnet.train.run_summary import summarise_run

        figure = curves([("base", summarise_run(Path("runs/base")))], points=2)
        (line,) = figure.panels[0].lines
        assert line.x == (15.0, 35.0)
        assert line.y == ((5 + 2.5) / 2, (50 / 30 + 1.25) / 2)
        assert (line.low, line.high) == ((2.5, 1.25), (5.0, 50 / 30))
        assert figure.panels[1].lines[0].name == "base"

    def test_steps_of_different_sizes_are_drawn_over_tokens(self, home):
        from retnet.cli.run_curves import curves
        from retnet.train.run_summary import summarise_run

        make_run(Path("runs/large"), config=CONFIG + "batch_size = 32\n")
        named = [(name, summarise_run(Path("runs") / name)) for name in ("base", "large")]
        panel = curves(named, points=99).panels[0]
        assert panel.x_label == "tokens"
        assert panel.lines[0].x[0] == 10 * 16 * 512
        assert panel.lines[1].x[0] == 10 * 32 * 512

    def test_mistakes_are_said_first(self, home):
        with pytest.raises(UserError, match=r"cannot write nowhere/curves\.png"):
            invoke("runs", "--plot", "nowhere/curves.png")
        Path("new/checkpoints").mkdir(parents=True)
        Path("new/config.toml").write_text(CONFIG)
        with pytest.raises(UserError, match="none of these runs has measured anything yet"):
            invoke("new", "--plot", "curves.png")
        assert invoke("--plot", "x.png", "--watch").exit_code == 2


class TestWatch:
    @pytest.fixture(autouse=True)
    def often(self, monkeypatch):
        monkeypatch.setattr(verb, "WATCHED", 0.05)

    def train_for_a_moment(self, path, last_step):
        """Holds a run, writes one more line, and lets go."""

        def work():
            with sole_owner(path):
                held.set()
                time.sleep(0.2)
                with (path / "metrics.jsonl").open("a") as file:
                    file.write(
                        f'{{"step": {last_step}, "seconds": 17.5, "loss": 1.4, "tokens_per_s": 1000}}\n'
                    )
                time.sleep(0.2)

        held, thread = threading.Event(), threading.Thread(target=work)
        thread.start()
        assert held.wait(10)
        return thread

    def test_lines_until_none_is_running(self, home):
        thread = self.train_for_a_moment(Path("runs/faster").resolve(), 35)
        lines = invoke("--watch").output.splitlines()
        thread.join()
        assert lines[:3] == [
            "base: finished, step 40/40, loss 1.250, bits/byte 2.0000, tokens/s 1,025, time 0:00:20",
            "broken: damaged, step 40, loss 1.250, bits/byte 2.0000, tokens/s 1,025, time 0:00:20",
            "faster: running, step 30/40, loss 1.667, bits/byte 2.0000, tokens/s 1,020, time 0:00:15",
        ]
        assert any(line.startswith("faster: running, step 35/40, loss 1.400") for line in lines)
        assert lines[-1].startswith("faster: stopped, step 35/40")
        assert len(lines) == 5

    def test_live_on_a_terminal(self, home, monkeypatch):
        on_terminal(monkeypatch, 80)
        thread = self.train_for_a_moment(Path("runs/faster").resolve(), 35)
        shown = invoke("--watch").output
        thread.join()
        assert "1 of 3 runs running" in shown
        assert "0 of 3 runs running" in shown
        assert "35/40" in shown

    def test_many_are_cut_to_the_height_of_the_terminal(self, home, monkeypatch):
        on_terminal(monkeypatch, 80)
        for n in range(30):
            make_run(Path(f"runs/more-{n}"))
        shown = invoke("--watch").output
        assert "0 of 33 runs running, 16 more not shown" in shown
        assert len(shown.rpartition("0 of 33")[2].splitlines()) <= 24

    def test_ctrl_c_ends_it(self, home, monkeypatch):
        def interrupt(_):
            raise KeyboardInterrupt

        monkeypatch.setattr(verb.time, "sleep", interrupt)
        with sole_owner(Path("runs/base")):
            assert invoke("--watch").exit_code == 0
