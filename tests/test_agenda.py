"What comes next: whole rows, the most telling first, and with a budget only what can be finished"
from collections import deque
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kdc_nb.experiments.agenda as agenda_room
import kdc_nb.experiments.runs as kr
import kdc_nb.training.trainer as trainer_room
from kdc_nb.files import save_tensors
from kdc_nb.training.data import DataSpec
from kdc_nb.training.methods import Method
from kdc_nb.training.recipes import Recipe
from kdc_nb.experiments.agenda import Scheduler
from kdc_nb.experiments.runs import RunContext
from kdc_nb.experiments.specs import Distil, RunSpec, lineage, run_label
from kdc_nb.experiments.store import Store
from kdc_nb.experiments.sweeps import sweep
from kdc_nb.experiments.teachers import TemperatureScaled

TINY = DataSpec("known", n_train=100, n_valid=60, n_test=80)
TEACHER = RunSpec(TINY, "resnet14", Method("nll"), Recipe(2, 50))
STUDENT = RunSpec(TINY, "resnet8", Distil(TEACHER), Recipe(2, 50))
OTHER = RunSpec(TINY, "resnet8", Distil(replace(TEACHER, method=Method("ls"))), Recipe(2, 50))


class Clock:
    "Time that passes when somebody says so"
    now = 0.
    def time(self): return self.now


@pytest.fixture
def clock(monkeypatch):
    it = Clock()
    monkeypatch.setattr(agenda_room, "time", it)
    return it


def agenda(folder, rows, until, places=1, **seconds):
    "An agenda that knows how long networks take"
    made = Scheduler(rows, RunContext(Store(folder), "cpu", places), until)
    if made.pace:
        # two epochs of 100 images
        made.pace.latest = {(TINY.name, model, 50): deque([s/200], 1) for model, s in seconds.items()}
    return made


def finish(made, run, seconds): made.mark_done(SimpleNamespace(spec=run, facts={"seconds": seconds}))


def test_a_row_is_begun_only_if_its_student_can_be_finished(tmp_path, clock):
    "Teacher 10 s, student 5"
    rows = [STUDENT, OTHER, replace(STUDENT, seed=3)]
    left = lambda until, places=1: [
        run_label(r) for r in agenda(tmp_path, rows, until, places, resnet14=10., resnet8=5.).start_times()
    ]
    assert left(14.9) == []
    assert left(15) == [run_label(r) for r in (TEACHER, STUDENT)]
    assert left(20) == [run_label(r)
                        for r in (TEACHER, STUDENT, rows[2])], "the row that is too long is passed over"
    assert left(30) == [run_label(r) for r in (*lineage(STUDENT), *lineage(OTHER))]
    assert left(15, 2) == [run_label(r)
                           for r in (*lineage(STUDENT), *lineage(OTHER))], "two places, side by side"


def test_a_teacher_that_is_a_row_too_comes_only_with_its_student(tmp_path, clock):
    "Fifteen seconds for both; the teacher alone would fit into twelve"
    rows = [STUDENT, TEACHER]
    assert agenda(tmp_path, rows, 12., resnet14=10., resnet8=5.).start_times() == {}
    assert list(agenda(tmp_path, rows[::-1], 15., resnet14=10., resnet8=5.).start_times()) == lineage(STUDENT)


def test_what_is_running_takes_its_place_and_its_time(tmp_path, clock):
    made = agenda(tmp_path, [STUDENT, OTHER], 32., resnet14=10., resnet8=5.)
    assert made.next() == TEACHER and made.next() is None, "its student waits for it, and there is one place"
    clock.now = 4.
    assert made.seconds(TEACHER) == 6.
    clock.now = 12. # slower than promised
    finish(made, TEACHER, 12.)
    assert made.next() == STUDENT
    clock.now = 17.
    finish(made, STUDENT, 5.)
    assert made.next() is None, "a teacher takes 12 seconds now, and 15 are left for it and its student"


def test_a_run_of_unknown_pace_is_tried_rather_than_nothing(tmp_path, clock):
    "By the teacher's pace a student would take ten seconds, of which six are left; it takes four"
    rows = [STUDENT, replace(STUDENT, seed=1), OTHER]
    made = agenda(tmp_path, rows, 16., resnet14=10.)
    assert made.next() == TEACHER and made.next() is None
    clock.now = 10.
    made.mark_trained(TEACHER)
    assert made.next() is None, "its evaluation may tell something"
    finish(made, TEACHER, 10.)
    assert made.next() == STUDENT and made.next() is None, "one at a time"
    clock.now = 14.
    finish(made, STUDENT, 4.)
    assert made.next() is None, "now it is known that none can be finished"


def test_a_first_run_that_fails_does_not_count_as_begun(tmp_path, clock):
    rows = [replace(TEACHER, seed=s) for s in (0, 1)]
    made = agenda(tmp_path, rows, 5., resnet14=10.)
    assert made.next() == rows[0], "too long, but the first of all"
    made.leave_out(rows[0], FloatingPointError())
    assert made.next() == rows[1]


def test_a_place_is_free_as_soon_as_its_run_only_waits_for_its_evaluation(tmp_path, clock):
    rows = [replace(TEACHER, seed=s) for s in (0, 1)]
    made = agenda(tmp_path, rows, 100., resnet14=10.)
    assert made.next() == rows[0] and made.next() is None
    clock.now = 10.
    made.mark_trained(rows[0])
    assert made.next() == rows[1]
    clock.now = 13.
    finish(made, rows[0], 10.)
    assert made.next() is None, "the place is taken"


def test_resumed_runs_are_no_reason_for_hope(tmp_path, clock):
    "Their seconds count what was done before they were resumed"
    made = agenda(tmp_path, [replace(TEACHER, seed=s) for s in range(6)], 1000., resnet14=10.)
    for k in range(5):
        run = made.next()
        clock.now += 2.
        finish(made, run, 10.)
    assert made.seconds(made.order[5]) == 10.


def test_time_beside_training_is_learned(tmp_path, clock):
    made = agenda(tmp_path, [STUDENT, OTHER], 30., resnet14=10., resnet8=5.)
    made.next()
    clock.now = 13.
    finish(made, TEACHER, 10.) # and 3 s of evaluation
    assert made.seconds(STUDENT) == 8.


def test_the_first_is_begun_even_if_it_cannot_be_finished(tmp_path, clock):
    made = agenda(tmp_path, [STUDENT, OTHER], 7., resnet14=10., resnet8=5.)
    assert made.next() == TEACHER
    made.leave_out(TEACHER, trainer_room.OutOfTime())
    assert made.next() is None
    assert agenda(tmp_path, [STUDENT], 0., resnet14=10.).next() is None, "no time at all"


def test_a_checkpoint_tells_what_is_left(tmp_path, clock):
    made = agenda(tmp_path, [STUDENT, OTHER], 100., resnet14=10., resnet8=5.)
    save_tensors(made.context.store.path(TEACHER, "part"), {}, epochs_done=1.5, history=[], seconds=30.)
    assert made.seconds(TEACHER) == pytest.approx(10), "half an epoch at twenty seconds an epoch"


def test_without_a_pace_runs_are_begun_and_what_is_unlike_others_counts_as_the_slowest(tmp_path, clock):
    assert (agenda(tmp_path, [STUDENT, OTHER], 5.).start_times()
            == dict.fromkeys([*lineage(STUDENT), *lineage(OTHER)], 0.))
    assert agenda(tmp_path, [STUDENT, OTHER], 19., resnet14=10.).start_times() == {}
    assert agenda(tmp_path, [STUDENT, OTHER], 20., resnet14=10.).start_times() == {TEACHER: 0., STUDENT: 10.}


def test_a_run_in_which_the_laptop_slept_is_forgotten(tmp_path, clock):
    made = agenda(tmp_path, [STUDENT, OTHER], 100.)
    kind = (TINY.name, "resnet8", 50)
    for seconds in (3600., 5., 5.): made.pace.add(STUDENT, seconds)
    assert (made.pace.seconds_per_image(kind) == 5/200 == made.pace.slowest_seconds_per_image()
            and made.pace.seconds_per_image(("known", "resnet20", 50)) is None)


def test_a_teacher_whose_weights_were_removed_is_a_run_like_any_other(tmp_path, monkeypatch):
    store, trained = Store(tmp_path), []
    before = sweep([TEACHER], store, "cpu", progress=False)
    store.path(TEACHER, "net").unlink()
    there = kr.RunContext.trained_net
    monkeypatch.setattr(kr.RunContext, "trained_net",
                        lambda *args: trained.append(store.path(TEACHER, "net").exists()) or there(*args))
    sweep([STUDENT], store, "cpu", progress=False, on_result=lambda r: trained.append(r.spec))
    assert trained == [TEACHER, True, STUDENT], "before its student asks"
    assert torch.equal(store.get(TEACHER).logits["test"], before[0].logits["test"])


def test_who_fails_takes_its_students_along(tmp_path):
    made = agenda(tmp_path, [STUDENT, OTHER, replace(TEACHER, seed=5)], None)
    made.next()
    made.leave_out(TEACHER, ValueError())
    assert [made.next(), made.next(), made.next()] == [OTHER.method.teacher, replace(TEACHER, seed=5), None]


RUNS = [RunSpec(TINY, model, Method(m), Recipe(2, 50))
        for model in ("resnet8", "resnet14", "resnet20") for m in ("nll", "ls")]


@settings(max_examples=150)
@given(st.data(), st.integers(1, 3), st.floats(1, 60))
def test_what_is_admitted_is_finished_in_time(tmp_path, data, places, until):
    """Played through on places that work as fast as promised: all that was begun ends in time, teachers
    before students, whole rows
    """
    some = data.draw(st.lists(st.sampled_from(RUNS), min_size=1, max_size=4))
    rows = some + [replace(data.draw(st.sampled_from(RUNS)), method=Distil(t))
                   for t in data.draw(st.lists(st.sampled_from(RUNS), max_size=4))]
    rows = data.draw(st.permutations(rows))
    took = {m: data.draw(st.floats(1, 20)) for m in ("resnet8", "resnet14", "resnet20")}
    clock, before = Clock(), agenda_room.time
    agenda_room.time = clock
    try:
        made, running, done = agenda(tmp_path, rows, until, places, **took), {}, []
        first = made.start_times()
        while True:
            while len(running) < places and (run := made.next()):
                assert not set(lineage(run)[:-1]) - set(done), "its teachers are done"
                running[run] = clock.now + took[run.model]
            if not running: break
            run = min(running, key=running.get)
            clock.now = running.pop(run)
            finish(made, run, took[run.model])
            done.append(run)
        assert set(first) <= set(done), "what is admitted is done"
        if first:
            assert clock.now <= until + 1e-6 and all(any(r in lineage(s) for s in rows if s in done)
                                                     for r in done), "no teacher without its student"
        if sum(took[r.model] for r in made.order) <= until:
            assert len(done) == len(made.order), "where there is time for all, all is done"
    finally: agenda_room.time = before


def test_an_interrupted_sweep_has_whole_rows(tmp_path):
    "In the order that was given"
    rows, seen = [STUDENT, OTHER, replace(TEACHER, seed=5)], []
    def stop(result):
        seen.append(result.spec)
        if len(seen) == 4: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): sweep(rows, Store(tmp_path), "cpu", progress=False, on_result=stop)
    assert seen == [*lineage(STUDENT), *lineage(OTHER)]


@pytest.mark.parametrize("bad", [dict(jobs=0), dict(slots=0), dict(slots=1.5),
                                 dict(jobs=2, slots=2), dict(jobs=True, slots=-1)])
def test_numbers_that_mean_nothing_are_refused(tmp_path, bad):
    with pytest.raises(ValueError, match="(jobs|slots): got"): sweep([TEACHER], Store(tmp_path), "cpu", **bad)


def test_the_budget_of_scaled_teachers(tmp_path, clock):
    "A student of the scaled teacher needs that teacher only"
    rows = [STUDENT, replace(STUDENT, method=Distil(TemperatureScaled(TEACHER)))]
    assert (agenda(tmp_path, rows, 20., resnet14=10., resnet8=5.).start_times()
            == {TEACHER: 0., rows[0]: 10., rows[1]: 15.})
