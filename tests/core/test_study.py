"""Studies: from a declaration to jobs, their order, what survives a kill, and bundles that can be checked again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import pandas as pd
import pytest

from vlm4vla_core.errors import InputError
from vlm4vla_core.folders import project_root
from vlm4vla_core.results import wilson
from vlm4vla_core.study import expand, read_study
from vlm4vla_core.study import run as running
from vlm4vla_core.study.bundle import EPISODES, NUMBERS, PLAN, export, numbers, open_bundle, retrain, verify
from vlm4vla_core.study.collect import collect
from vlm4vla_core.study.cost import DEVICES, PROMPT_TOKENS, UTILISATION, costs, remaining
from vlm4vla_core.study.jobs import CONFIG, PRODUCT, write_toml
from vlm4vla_core.study.state import DONE, FAILED, RUNNING, STALE, jobs_folder, look
from vlm4vla_core.verbs.study import Args
from vlm4vla_core.verbs.study import run as verb

STUDY = """
name = "try"
[[data]]
name = "demos"
world = "tabletop"
options = { tasks = ["move"], episodes = 4, size = 56 }
[[backbone]]
name = "qwen"
set = { image_size = 56 }
[[backbone]]
name = "pali"
set = { image_size = 64, family = "paligemma" }
[[stage]]
name = "words"
preset = "tiny"
data = "demos"
set = { objective = "language", max_steps = 2, warmup_steps = 1, batch_size = 2 }
[[benchmark]]
protocol = "tabletop-tasks@1"
preset = "tiny"
data = "demos"
tasks = ["move"]
episodes = 2
baselines = ["mean-action"]
set = { max_steps = 2, warmup_steps = 1, batch_size = 2, val_every = 0, save_every = 0 }
[[arm]]
name = "full"
seeds = [0, 1]
[[arm]]
name = "words"
stages = ["words"]
backbones = ["qwen"]
[[arm]]
name = "words-frozen"
stages = ["words"]
set = { freeze = ["vision"] }
backbones = ["qwen"]
"""


def write(folder: Path, text: str = STUDY) -> Path:
    path = folder / "study.toml"
    path.write_text(text)
    return path


def planned(folder: Path, text: str = STUDY):
    return expand(read_study(write(folder, text)))


# --- declaration and plan


def test_a_shared_stage_is_one_job_and_every_job_comes_after_its_needs(tmp_path):
    plan = planned(tmp_path)
    assert len(plan.cells) == 4 + 1 + 1  # full: 2 backbones x 2 seeds; words and words-frozen: one each
    words = [cell for cell in plan.cells if cell.arm.startswith("words")]
    assert words[0].trainings[0] == words[1].trainings[0] and words[0].trainings[1] != words[1].trainings[1]
    kinds = [job.kind for job in plan.jobs.values()]
    assert kinds.count("train") == 4 + 1 + 2 and kinds.count("record") == 1 and kinds.count("evaluate") == 6 + 1
    order = list(plan.jobs)
    assert all(order.index(need) < order.index(one) for one, job in plan.jobs.items() for need in job.needs.values())


def test_ids_know_what_decides_a_result_and_nothing_else(tmp_path):
    before = set(planned(tmp_path).jobs)
    more = STUDY + '[[arm]]\nname = "scratch"\ninit = "scratch"\nbackbones = ["qwen"]\n'
    assert before < set(planned(tmp_path, more).jobs)  # a new arm adds jobs and leaves the others alone
    assert set(planned(tmp_path, STUDY.replace("episodes = 2", "episodes = 20")).jobs) == before  # an amount
    assert set(planned(tmp_path, STUDY.replace("val_every = 0, ", "val_every = 1, ")).jobs) == before  # operational
    default = STUDY.replace('[[arm]]\nname = "full"', '[[arm]]\nname = "full"\nset = { dropout = false }')
    assert set(planned(tmp_path, default).jobs) == before
    other = set(
        planned(
            tmp_path, STUDY.replace("max_steps = 2, warmup_steps = 1, batch_size = 2, val", "max_steps = 3, val")
        ).jobs
    )
    assert len(before & other) == 1 + 1 + 1  # the store, the stage in words, the baseline
    stored = set(planned(tmp_path, STUDY.replace("episodes = 4, size", "episodes = 5, size")).jobs)
    assert not before & stored  # all of it reads the store


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('backbones = ["qwen"]', 'backbones = ["qwn"]', "arm 'words': no backbone 'qwn'; did you mean 'qwen'"),
        ("episodes = 2", "episods = 2", "unknown key 'episods' ([[benchmark]] tabletop-tasks@1)"),
        ('preset = "tiny"\ndata = "demos"\ntasks', 'preset = "tny"\ndata = "demos"\ntasks', "unknown preset 'tny'"),
        ("freeze", "freez", "unknown setting 'freez'"),
        ("tabletop-tasks@1", "tabletop-task@1", "unknown benchmark 'tabletop-task@1'"),
        ('data = "demos"\ntasks', 'data = "dems"\ntasks', "no data 'dems'"),
        ('name = "pali"', 'name = "qwen"', "two backbone entries are called 'qwen'"),
        ("set = { image_size = 56 }", "set = { seed = 3 }", "'qwen' sets seed"),
        ('world = "tabletop"', "", "data 'demos' needs either world or store"),
        ('name = "try"', "", "'name' is missing"),
        ("[[arm]]", "[[arm", "not a valid TOML file"),
        ("set = { image_size = 56 }", 'source = "data/nano/none"', "a file that ships with the project is missing"),
    ],
)  # fmt: skip
def test_a_wrong_declaration_is_refused_in_one_line(tmp_path, old, new, words):
    assert old in STUDY
    with pytest.raises(InputError) as error:
        planned(tmp_path, STUDY.replace(old, new, 1))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_written_settings_come_back_as_the_same_configuration(tmp_path):
    from vlm4vla_core.presets import make_config

    both = 'set = { freeze = ["vision"], auxiliary = { language = 0.1 } }'
    plan = planned(tmp_path, STUDY.replace('set = { freeze = ["vision"] }', both))
    trainings = [job for job in plan.jobs.values() if job.config]
    assert any(job.config.auxiliary for job in trainings)
    for job in trainings:
        write_toml(tmp_path / CONFIG, job.config)
        assert make_config(str(tmp_path / CONFIG)) == job.config.model_copy(update={"backbone": "tiny"})


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "studies").glob("paper_*.toml")), ids=lambda p: p.stem
)
def test_the_papers_studies_can_be_planned(path):
    plan = expand(read_study(path))
    assert plan.cells and {cell.seed for cell in plan.cells} >= {123, 124, 125}  # never one training seed
    assert all(cell.execute for cell in plan.cells)  # fixed beforehand
    models = {"paper_capability": 10, "paper_freezing": 3, "paper_scratch": 3}.get(path.stem, 1)
    assert len({cell.backbone for cell in plan.cells}) == models


def test_draws_are_evaluations_more_of_the_same_policy(tmp_path):
    text = STUDY.replace('name = "full"', 'name = "full"\nset = { head = "flow" }', 1)
    before, plan = planned(tmp_path, text), planned(tmp_path, text.replace('"flow" }', '"flow" }\ndraws = [0, 7]', 1))
    assert set(before.jobs) < set(plan.jobs) and len(plan.jobs) - len(before.jobs) == 4 * 2
    drawn = [cell for cell in plan.cells if cell.draw is not None]
    assert [cell.name for cell in drawn][:2] == [f"full/qwen/tabletop-tasks@1/0/draw{n}" for n in (0, 7)]
    assert {cell.trainings for cell in drawn} == {cell.trainings for cell in before.cells if cell.arm == "full"}
    words = [plan.jobs[cell.evaluation].command(tmp_path, plan.jobs) for cell in drawn[:2]]
    assert [word[word.index("--draw") + 1] for word in words] == ["0", "7"]
    with pytest.raises(InputError, match="arm 'full' asks for draws, and its head 'fc' draws nothing"):
        planned(tmp_path, STUDY.replace('name = "full"', 'name = "full"\ndraws = [1]', 1))


def test_a_drawn_backbone_keeps_its_name_and_size(tmp_path):
    nano = STUDY.replace(
        'name = "qwen"\nset = { image_size = 56 }', 'name = "qwen"\nsource = "nano"\nset = { size = "xs" }'
    )
    plan = planned(tmp_path, nano)
    job = next(job for job in plan.jobs.values() if job.name.startswith("full-qwen"))
    write_toml(tmp_path / CONFIG, job.config)
    assert 'backbone = "nano"' in (tmp_path / CONFIG).read_text() and job.spec["settings"]["size"] == "xs"
    assert job.id not in planned(tmp_path).jobs


# --- states and the order of work


class Instant:
    """An executor that carries nothing out: a job is done at once, or fails when its folder's name says so."""

    def __init__(self, slots: int = 1, fails: str = "nothing") -> None:
        self.slots, self.fails, self.ran = slots, fails, []

    def room(self, gpus: int) -> bool:
        return True

    def stop(self) -> None:
        pass

    def submit(self, folder: Path, words: list[str], amount: int, gpus: int, threads: int) -> Future[int]:
        self.ran.append(folder.name)
        failed = self.fails in folder.name
        facts = {"reason": "as asked", "seconds": 1.0, "tries": 1, "code": 2, "amount": amount}
        (folder / (FAILED if failed else DONE)).write_text(json.dumps(facts))
        if not failed:
            (folder / PRODUCT).mkdir(exist_ok=True)
            (folder / FAILED).unlink(missing_ok=True)
        future: Future[int] = Future()
        future.set_result(2 if failed else 0)
        return future


def test_a_failed_job_stops_what_needs_it_and_is_tried_again_next_time(tmp_path):
    plan, out = planned(tmp_path), tmp_path / "out"
    first = Instant(fails="train-words-qwen-0")
    status = running.run(plan, out, first)
    assert len(status.of("failed")) == 1 and len(status.of("blocked")) == 4  # two trainings and their evaluations
    assert status.states[status.of("failed")[0]].note == "as asked"
    assert len(status.of("done")) == len(plan.jobs) - 5
    again = Instant()
    status = running.run(plan, out, again)
    assert len(again.ran) == 5 and again.ran[0] == first.ran[-1 - first.ran[::-1].index(again.ran[0])]
    assert len(status.of("done")) == len(plan.jobs)
    nothing = Instant()
    running.run(plan, out, nothing)
    assert nothing.ran == []
    more = Instant()
    running.run(planned(tmp_path, STUDY.replace("episodes = 2", "episodes = 3")), out, more)
    assert len(more.ran) == 7 and all(name.startswith("evaluate") for name in more.ran)


def test_a_kind_of_job_or_a_cell_can_be_run_alone(tmp_path, monkeypatch):
    executor = Instant()
    monkeypatch.setattr("vlm4vla_core.verbs.study._executor", lambda args, study: executor)
    monkeypatch.setattr("vlm4vla_core.study.collect.collect", lambda *args: _Empty())
    path, out = write(tmp_path), tmp_path / "out"
    assert verb(Args("run", path, out=out, only=("words/qwen/*",))) == 0
    assert [name.split("-")[0] for name in executor.ran] == ["record", "train", "train", "evaluate"]
    with pytest.raises(InputError, match="no cell, axis or kind"):
        verb(Args("run", path, out=out, only=("wrds/*",)))


class _Empty:
    episodes = pd.DataFrame()

    def write(self, folder: Path) -> None:
        pass


def test_a_fresh_sign_of_life_means_running_and_a_stale_one_nothing(tmp_path):
    plan, out = planned(tmp_path), tmp_path / "out"
    one, job = next(iter(plan.jobs.items()))
    folder = jobs_folder(out) / job.folder
    folder.mkdir(parents=True)
    (folder / RUNNING).write_text(json.dumps({"began": time.time() - 5}))
    assert look(plan, out).states[one].state == "running"
    old = time.time() - STALE - 1
    os.utime(folder / RUNNING, (old, old))
    assert look(plan, out).states[one].state == "ready"
    (folder / DONE).write_text('{"amount": 0, "seco')  # cut short
    assert look(plan, out).states[one].state == "ready"


def test_a_job_that_shows_a_sign_of_life_is_waited_for_and_a_dead_one_is_not(tmp_path):
    import platform
    import threading

    beat = tmp_path / RUNNING
    running.wait_for_another(tmp_path)  # nobody
    beat.write_text(json.dumps({"host": platform.node(), "pid": 2**22 + 1}))  # above what Linux gives
    running.wait_for_another(tmp_path)
    beat.write_text(json.dumps({"host": "a machine that was cut off", "pid": os.getpid()}))
    waiting = threading.Thread(target=running.wait_for_another, args=(tmp_path, 0.01))
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    old = time.time() - STALE - 1
    os.utime(beat, (old, old))
    waiting.join(30)
    assert not waiting.is_alive()


def test_a_task_that_is_lost_for_good_is_a_failed_job_and_a_cancelled_one_is_not(tmp_path):
    from types import SimpleNamespace

    class Cancelled(Exception):
        pass

    ray = running.Ray.__new__(running.Ray)
    ray._ray = SimpleNamespace(exceptions=SimpleNamespace(TaskCancelledError=Cancelled))

    def came(result: int | Exception) -> int:
        task: Future[int] = Future()
        task.set_exception(result) if isinstance(result, Exception) else task.set_result(result)
        return ray._came(task, tmp_path)

    assert came(0) == 0 and came(2) == 2 and came(Cancelled("stop")) == 130 and not (tmp_path / FAILED).exists()
    assert came(RuntimeError("the node died\nand more")) == 1
    told = json.loads((tmp_path / FAILED).read_text())
    assert told["reason"] == "Ray lost it for good (RuntimeError: the node died)" and told["seconds"] == 0.0


def test_a_folder_of_another_study_or_of_anything_else_is_refused(tmp_path):
    plan = planned(tmp_path)
    running.run(plan, tmp_path / "out", Instant())
    with pytest.raises(InputError, match="holds the study 'try'"):
        running.run(planned(tmp_path, STUDY.replace('"try"', '"other"')), tmp_path / "out", Instant())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("dear diary")
    with pytest.raises(InputError, match="holds no study"):
        running.run(plan, tmp_path / "mine", Instant())
    with running.held(tmp_path / "out", plan), pytest.raises(InputError, match="another process is running the study"):
        running.run(plan, tmp_path / "out", Instant())


def test_local_jobs_at_the_same_time_never_share_a_gpu(tmp_path, monkeypatch):
    import threading

    gate, busy, most, seen, trained = threading.Barrier(2, timeout=60), [], [], [], []

    def perform(folder, words, *, amount, gpus, threads, stop):
        assert (gpus is None) == (words[0] == "record")  # it is kept from them
        gpus = gpus or []
        busy.extend(gpus)
        seen.append(tuple(gpus))
        most.append(len(busy) - len(set(busy)))
        if words[0] == "train" and (trained.append(1) or len(trained) <= 2):
            gate.wait()
        for gpu in gpus:
            busy.remove(gpu)
        (folder / DONE).write_text(json.dumps({"seconds": 1.0, "amount": amount}))
        (folder / PRODUCT).mkdir()
        return 0

    monkeypatch.setattr(running, "perform", perform)
    text = STUDY.replace("[[stage]]", "[resources]\ntrain_gpus = 1\n[[stage]]")
    text = text.replace(
        "[[data]]", '[[data]]\nname = "more"\nworld = "tabletop"\noptions = { episodes = 1 }\n[[data]]', 1
    )
    plan = planned(tmp_path, text)
    status = running.run(plan, tmp_path / "out", running.Local(2, gpus=[4, 7]))
    assert len(status.of("done")) >= len(plan.jobs) - 1  # the store that nobody reads is not made
    assert max(most) == 0 and {gpu for gpus in seen for gpu in gpus} == {4, 7}


# --- costs


def test_operations_are_six_per_parameter_and_token_that_meet(tmp_path):
    from vlm4vla_core.sizes import size_of

    text = STUDY.replace('name = "qwen"', 'name = "qwen"\nsource = "Qwen/Qwen2.5-VL-3B-Instruct"')
    text = text.replace("set = { image_size = 56 }", "set = { image_size = 224 }")
    plan = planned(tmp_path, text)
    price = costs(plan)
    one = next(one for one, job in plan.jobs.items() if job.config and job.name.startswith("full-qwen"))
    parts = size_of("Qwen/Qwen2.5-VL-3B-Instruct", image_size=224).parts
    # 2 steps of 2 samples; a picture of 224 px is 256 patches of 14, merged into 64 tokens, beside words
    patches, tokens = 256, 64 + PROMPT_TOKENS
    by_hand = 6 * 4 * (parts["vision"] * patches + (parts["projector"] + parts["decoder"]) * tokens)
    assert price[one].operations == pytest.approx(by_hand)
    frozen = next(one for one, job in plan.jobs.items() if job.config and job.name.startswith("words-frozen-qwen"))
    assert price[frozen].operations == pytest.approx(by_hand - 4 * 4 * parts["vision"] * patches)  # forward only
    assert price[one].gpu_hours("h100") == pytest.approx(price[one].operations / (989e12 * UTILISATION * 3600))
    with pytest.raises(InputError, match="did you mean 'h100'"):
        price[one].gpu_hours("h1000")
    assert set(DEVICES) >= {"a100", "h100", "h200"}


def test_measured_seconds_correct_the_estimate(tmp_path):
    plan, out = planned(tmp_path), tmp_path / "out"
    running.run(plan, out, Instant(fails="train-full-qwen"))  # every done job took 1 s
    status = look(plan, out)
    todo = [one for one in status.of("failed", "blocked") if plan.jobs[one].kind == "train"]
    assert len(todo) == 2
    assert remaining(plan, status, todo, "cpu-core") == pytest.approx(2.0, rel=0.01)


# --- for real


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "vlm4vla_core.cli", "study", *map(str, words)]


SMALL = (
    STUDY[: STUDY.index("[[arm]]")].replace('name = "pali"', 'name = "unused"')
    + """
[[arm]]
name = "words"
stages = ["words"]
backbones = ["qwen"]
[[capability]]
episodes = 1
of = ["stages"]
"""
)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A study that was really run: store, stage in words, policy, rollouts, questions, a baseline."""
    folder = tmp_path_factory.mktemp("study")
    path, out = write(folder, SMALL), folder / "out"
    done = subprocess.run(
        command("run", path, "--out", out), capture_output=True, text=True, timeout=400, env=environment()
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return path, out


def test_a_small_study_runs_for_real_and_its_tables_say_what_came_of_it(real, capsys):
    path, out = real
    plan = expand(read_study(path))
    status = look(plan, out)
    assert sorted(plan.jobs[one].kind for one in status.of("done")) == [
        "ask",
        "evaluate",
        "evaluate",
        "record",
        "train",
        "train",
    ]
    tables = collect(plan, out)
    assert set(tables.episodes["arm"]) == {"words", "baseline"} and len(tables.episodes) == 4
    mine = tables.episodes[tables.episodes["arm"] == "words"]
    assert set(mine["aux"]) == {"language"} and set(mine["provenance"]) == {"run here"}
    assert list(tables.stages["when"]) == ["start", "end"] * 2 and set(tables.stages["objective"]) == {
        "language",
        "action",
    }
    assert tables.capability["model"].tolist() == ["qwen+words"] and tables.capability["stages"].tolist() == ["words"]
    assert numbers(pd.read_parquet(out / "tables" / "episodes.parquet")) == numbers(tables.episodes)
    assert verb(Args("status", path, out=out, json=out.parent / "status.json")) == 0
    assert "6 done" in capsys.readouterr().out
    assert json.loads((out.parent / "status.json").read_text())["count"] == {"done": 6}


def test_a_bundle_verifies_ships_and_betrays_what_was_changed(real, tmp_path, capsys):
    path, out = real
    plan, bundle = expand(read_study(path)), tmp_path / "bundle"
    manifest = export(plan, out, bundle)
    assert len(manifest["jobs"]) == 3 and not list(bundle.rglob("*.safetensors"))
    assert [check.holds for check in verify(bundle)] == [True, True, True]
    assert str(out) not in (bundle / PLAN).read_text()  # no place of this machine

    shipped = tmp_path / "shipped"
    shipped.mkdir()
    text = SMALL.replace('name = "try"', f'name = "try"\nshipped = "{bundle}"')
    executor = Instant()
    again = planned(shipped, text)
    status = running.run(again, shipped / "out", executor)
    assert executor.ran == [] and len(status.of("shipped")) == 3
    tables, before = collect(again, shipped / "out"), collect(plan, out)
    assert set(tables.episodes["provenance"]) == {"shipped"} and len(tables.stages) == 4
    assert numbers(tables.episodes) == numbers(before.episodes)
    assert tables.capability["score"].tolist() == before.capability["score"].tolist()
    assert tables.cells["state"].tolist() == ["shipped"] and tables.cells["train_s"].tolist()[0] > 0
    assert verb(Args("plan", shipped / "study.toml", out=shipped / "out")) == 0
    assert "shipped" in capsys.readouterr().out
    twice = export(again, shipped / "none", tmp_path / "twice")  # what is shipped goes on being shipped
    assert twice["jobs"] == manifest["jobs"] and [check.holds for check in verify(tmp_path / "twice")] == [True] * 3
    live = planned(shipped, text.replace('name = "try"', 'name = "try"\nlive = ["words/*"]'))
    todo = look(live, shipped / "none").of("ready", "waiting")
    assert sorted(live.jobs[one].kind for one in todo) == ["evaluate", "record", "train", "train"]

    told = (bundle / NUMBERS).read_text()
    (bundle / NUMBERS).write_text(told.replace('"successes": 0', '"successes": 2'))
    with pytest.raises(InputError, match="differs from the manifest"):
        verify(bundle)


def test_nothing_but_the_live_cells_is_run_where_the_study_says_so(tmp_path):
    text = STUDY.replace('name = "try"', 'name = "try"\nonly_live = true\nlive = ["words/*"]', 1)
    plan, executor = planned(tmp_path, text), Instant()
    status = running.run(plan, tmp_path / "out", executor)
    assert [name.split("-")[0] for name in executor.ran] == ["record", "train", "train", "evaluate"]
    assert status.of("ready", "waiting", "left out") == []
    assert [state.state for one, state in status.states.items() if one not in status.wanted] == ["left out"] * 11


def test_a_pattern_names_all_folders_that_match_and_arms_may_choose_by_pattern(tmp_path):
    for name in ("small-a", "small-b", "other"):
        (tmp_path / "zoo" / name).mkdir(parents=True)
        (tmp_path / "zoo" / name / "config.json").write_text(json.dumps({"model_type": name}))
    text = STUDY.replace('name = "pali"\nset = { image_size = 64, family = "paligemma" }', 'source = "zoo/*"')
    text = text.replace('name = "full"\nseeds = [0, 1]', 'name = "full"\nbackbones = ["small-*"]')
    study = read_study(write(tmp_path, text))
    assert [one.name for one in study.backbone] == ["qwen", "other", "small-a", "small-b"]
    full = [cell.backbone for cell in expand(study).cells if cell.arm == "full"]
    assert full == ["small-a", "small-b"]
    own = text.replace("[[stage]]", '[[backbone]]\nname = "other"\nset = { seed = 1 }\n[[stage]]', 1)
    with pytest.raises(InputError, match="'other' sets seed"):  # the entry of its own, not the pattern's
        read_study(write(tmp_path, own))


def test_a_stage_with_a_seed_is_trained_once_for_all_seeds_of_an_arm(tmp_path):
    text = STUDY.replace('name = "words"\nstages = ["words"]', 'name = "words"\nseeds = [0, 1]\nstages = ["words"]', 1)
    cells = [cell for cell in planned(tmp_path, text).cells if cell.arm == "words"]
    assert cells[0].trainings[0] != cells[1].trainings[0]
    fixed = text.replace('name = "words"\npreset', 'name = "words"\nseed = 7\npreset', 1)
    cells = [cell for cell in planned(tmp_path, fixed).cells if cell.arm == "words"]
    assert cells[0].trainings[0] == cells[1].trainings[0] and cells[0].trainings[1] != cells[1].trainings[1]


def test_numbers_are_checked_against_the_rows_and_ids_against_the_settings(real, tmp_path):
    from vlm4vla_core import folders

    path, out = real
    bundle = tmp_path / "bundle"
    manifest = export(expand(read_study(path)), out, bundle)
    rows = pd.read_parquet(bundle / EPISODES)
    rows["success"] = ~rows["success"].astype(bool)
    rows.to_parquet(bundle / EPISODES)
    # a forger keeps the hashes true
    folders.write_manifest(bundle, "study", config={}, inputs={}, jobs=manifest["jobs"])
    checks = verify(bundle)
    assert [check.holds for check in checks] == [True, True, False]
    assert "differ; the first: told " in checks[2].found
    told = folders.read_json(bundle / PLAN)
    next(job for job in told["jobs"].values() if job["kind"] == "train")["spec"]["settings"]["max_steps"] = 3
    folders.write_json(bundle / PLAN, told)
    folders.write_manifest(bundle, "study", config={}, inputs={}, jobs=manifest["jobs"])
    assert [check.holds for check in verify(bundle)] == [True, False, False]


def test_pages_are_compared_by_answer_numbers_and_figures(real, tmp_path):
    path, out = real
    page = {"answer": "Yes.", "numbers": {"r": 0.1 + 0.2}, "figures": ["a", "b"]}

    def pages(change: dict, drawn: str = "matplotlib 3"):
        return lambda bundle: {"drawn_with": drawn, "pages": {"overview": {**page, **change}}}

    bundle = tmp_path / "bundle"
    export(expand(read_study(path)), out, bundle, pages({}))
    assert [check.holds for check in verify(bundle, pages({"numbers": {"r": 0.3}}))] == [True] * 4
    assert not verify(bundle, pages({"answer": "No."}))[-1].holds
    assert not verify(bundle, pages({"numbers": {"r": 0.31}}))[-1].holds
    assert not verify(bundle, pages({"figures": ["a", "c"]}))[-1].holds
    other = verify(bundle, pages({"figures": ["a", "c"]}, "matplotlib 4"))[-1]
    assert other.holds and "by their number alone" in other.found


def test_every_draw_has_a_line_of_its_own():
    rows = pd.DataFrame({
        "arm": "a", "backbone": "b", "protocol": "p@1", "cell_seed": 0, "execute": 4,
        "success": [True, False, True, True], "draw": pd.array([None, None, 3, 3], "Int64"),
    })  # fmt: skip
    told = {line.get("draw"): (line["successes"], line["episodes"]) for line in numbers(rows)}
    assert told == {None: (1, 2), 3: (2, 2)}


def test_numbers_by_hand():
    rows = pd.DataFrame({
        "arm": "a", "backbone": "b", "protocol": "p@1", "cell_seed": [0, 0, 0, 1], "execute": 4,
        "success": [True, False, False, True], "chain": [5, 2, 2, 5],
    })  # fmt: skip
    first, second = numbers(rows)
    assert (first["episodes"], first["successes"], first["mean_chain"]) == (3, 1, 3.0)
    assert first["interval"] == pytest.approx([0.0615, 0.7923], abs=1e-4)  # Wilson, 1 of 3
    assert (second["cell_seed"], second["rate"]) == (1, 1.0)


def test_what_a_study_runs_live_is_in_its_bundle_too_and_a_cell_that_cannot_be_trained_again_is_bad(real, tmp_path):
    path, out = real
    text = SMALL.replace('name = "try"', 'name = "try"\nonly_live = true\nlive = ["words/*"]', 1)
    (path.parent / "live.toml").write_text(text)
    bundle = tmp_path / "bundle"
    manifest = export(expand(read_study(path.parent / "live.toml")), out, bundle)
    assert len(manifest["jobs"]) == 3 and [check.holds for check in verify(bundle)] == [True] * 3
    study = open_bundle(bundle).plan().study
    (check,) = retrain(expand(study), 1, tmp_path / "again", 0, look)  # a runner that runs nothing
    assert not check.holds and check.what == "words/qwen/tabletop-tasks@1/0" and "could not be trained" in check.found
    (path.parent / "more.toml").write_text(f'shipped = "{bundle}"\n{text}')
    again = export(expand(read_study(path.parent / "more.toml")), tmp_path / "none", tmp_path / "twice")
    assert again["jobs"] == manifest["jobs"]  # the live cell was not run here, and its rows are not lost


def test_what_is_said_of_a_cell_that_was_trained_again():
    from vlm4vla_core.study.bundle import _again

    def line(successes: int) -> dict:
        return {"successes": successes, "episodes": 50, "interval": list(wilson(successes, 50))}

    here, there = ["a core"] * 2, ["a core", "another core"]
    assert _again("c", line(20), line(20), [line(20)], here, here).holds
    off = _again("c", line(20), line(21), [line(20)], here, here)
    assert not off.holds and off.found.startswith("20 of 50 shipped, 21 of 50 again; the same hardware class (a core)")
    near = _again("c", line(20), line(25), [line(20), line(22)], here, there)
    assert (
        near.holds and "recorded on a core; here a core, another core" in near.found and "2 shipped seeds" in near.found
    )
    assert not _again("c", line(5), line(40), [line(5)], here, there).holds


@pytest.mark.slow  # records, trains and evaluates once more
def test_a_shipped_cell_is_trained_again_to_the_same_count(real, tmp_path):
    path, out = real
    bundle = tmp_path / "bundle"
    export(expand(read_study(path)), out, bundle)
    study = open_bundle(bundle).plan().study
    checks = retrain(
        expand(study), 1, tmp_path / "again", 0, lambda plan, folder: running.run(plan, folder, running.Local(1))
    )
    assert [check.holds for check in checks] == [True] and "not the same" not in checks[0].found


KILLED = """
name = "killed"
[[benchmark]]
protocol = "tabletop-tasks@1"
preset = "tiny"
data = "none"
episodes = 1
baselines = ["zero", "random"]
[[benchmark]]
protocol = "tabletop-abc@1"
preset = "tiny"
data = "none"
episodes = 1
baselines = ["zero"]
[[data]]
name = "none"
world = "tabletop"
"""


def test_a_killed_study_goes_on_and_does_nothing_twice(tmp_path):
    path, out = write(tmp_path, KILLED), tmp_path / "out"
    process = subprocess.Popen(
        command("run", path, "--out", out, "--jobs", 1), stdout=subprocess.DEVNULL, env=environment()
    )
    deadline = time.time() + 120
    while not list(out.glob(f"jobs/*/{DONE}")) or not list(out.glob(f"jobs/*/{RUNNING}")):
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.02)
    child = json.loads(next(out.glob(f"jobs/*/{RUNNING}")).read_text())["pid"]
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    while Path(f"/proc/{child}").exists() and "zombie" not in Path(f"/proc/{child}/status").read_text():
        assert time.time() < deadline  # the job must not outlive the study
        time.sleep(0.05)
    before = {one: one.stat().st_mtime_ns for one in out.glob(f"jobs/*/{DONE}")}
    assert 1 <= len(before) < 3
    done = subprocess.run(
        command("run", path, "--out", out), capture_output=True, text=True, timeout=120, env=environment()
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(out.glob(f"jobs/*/{DONE}"))) == 3
    assert all(one.stat().st_mtime_ns == when for one, when in before.items())


def test_a_failing_verb_is_told_with_its_own_words(tmp_path, capsys):
    store = tmp_path / "broken"
    store.mkdir()
    (store / "dataset.json").write_text("{}")
    text = KILLED.replace('world = "tabletop"', 'store = "broken"').replace('["zero", "random"]', '["mean-action"]')
    text = text.replace('baselines = ["zero"]', "")
    assert verb(Args("run", write(tmp_path, text), out=tmp_path / "out")) == 1
    said = capsys.readouterr().out
    assert "failed: evaluate-mean-action-tabletop-tasks@1" in said
    assert "found format 'unknown'" in said
    shutil.rmtree(store)
    assert verb(Args("run", write(tmp_path, text), out=tmp_path / "out2")) == 1
    assert "there is no store" in capsys.readouterr().out


# --- what ships


@pytest.mark.parametrize("name", sorted(path.name for path in (project_root() / "studies").glob("[!_]*.toml")))
def test_every_study_that_ships_expands_and_its_arms_are_compared_with_arms_of_the_same_benchmarks(name):
    plan = expand(read_study(project_root() / "studies" / name))
    assert plan.cells
    arms = {arm.name: arm for arm in plan.study.arm}
    where = {(cell.arm, cell.backbone, cell.protocol) for cell in plan.cells}
    for cell in plan.cells:
        if other := arms[cell.arm].against:
            assert (other, cell.backbone, cell.protocol) in where


def test_the_miniature_asks_all_questions_of_enough_models_and_no_policy_costs_more_than_minutes():
    plan = expand(read_study(project_root() / "studies/nano_full.toml"))
    axes = {axis for arm in plan.study.arm for axis in arm.axis}
    assert axes == {"capability", "auxiliary", "freezing", "scratch", "injection", "divergence", "heads"}
    capability = {arm.name for arm in plan.study.arm if "capability" in arm.axis}
    vlms = {(cell.backbone, cell.trainings[:-1]) for cell in plan.cells if cell.arm in capability}
    assert len(vlms) >= 30 and len({cell.protocol for cell in plan.cells}) == 3
    seeds: dict[tuple, set[int]] = {}
    for cell in plan.cells:
        seeds.setdefault((cell.arm, cell.backbone, cell.protocol, cell.draw), set()).add(cell.seed)
    assert min(map(len, seeds.values())) >= 3
    flow = [cell for cell in plan.cells if cell.arm == "flow"]  # on repeated identical episodes
    assert len({cell.trainings for cell in flow}) == 3 and len({cell.draw for cell in flow}) == 1 + 5
    price = costs(plan)
    plain = [cell for cell in plan.cells if cell.arm == "full" and cell.backbone == "paligemma-s"]
    assert max(price[cell.trainings[-1]].seconds("cpu-core") for cell in plain) < 250
    small = expand(read_study(project_root() / "studies/nano.toml"))
    assert set(small.jobs) == set(plan.jobs)
    assert {cell.name for cell in small.cells} >= set(small.study.live) and len(small.study.live) <= 3
    todo = look(small, Path("nowhere")).of("ready", "waiting")  # a store, and training and rollouts of the live cells
    assert sorted(small.jobs[one].kind for one in todo) == ["evaluate", "record", "train"]
