"""Which trajectory and which run a call of `step` belongs to: threads, interleaved loops, copies, broken orders."""

from __future__ import annotations

import contextvars
import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from scheduling import KINDS, ByFormula, loop, made, network, relative, state
from torch import Tensor

import logsnr as ls
from logsnr.adapters.diffusers.scheduler import trajectory


def test_views_slices_and_numbers_find_their_step() -> None:
    scheduler = made()
    scheduler.set_timesteps(10)
    whole = loop(scheduler, state())
    for timesteps in (
        scheduler.timesteps,
        [t.expand(1) for t in scheduler.timesteps],
        [t.clone() for t in scheduler.timesteps],
        scheduler.timesteps.tolist(),
    ):
        assert torch.equal(loop(scheduler, state(), timesteps), whole)
    assert scheduler.step_index == 10
    assert scheduler.index_for_timestep(scheduler.timesteps[3]) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_starting_late_is_the_tail_of_the_plan(kind: str) -> None:
    scheduler = made(kind, solver="ipndm")
    scheduler.set_timesteps(8)
    for begin in (None, 3):
        if begin is not None:
            scheduler.set_begin_index(begin)
        found = loop(scheduler, state(), scheduler.timesteps[3:])
        scale = scheduler.model.scale(scheduler.plan.sigmas[3])
        wanted = ls.sample(ByFormula(scheduler), scheduler.plan.tail(3), noise=state() / scale)
        assert relative(found, wanted) < 1e-5


def test_interleaved_runs_in_one_thread() -> None:
    """Two trajectories by their timesteps, two runs along one trajectory by their states."""
    scheduler = made(gamma=2.0)
    scheduler.set_timesteps(6)
    first = scheduler.timesteps
    alone = loop(scheduler, state(0), first), loop(scheduler, state(1), first)
    scheduler.set_timesteps(6)
    second = scheduler.timesteps
    x, y, u, v = (state(seed) for seed in (0, 1, 0, 1))
    for t, other in zip(first, second, strict=True):
        x = scheduler.step(network(x, t), t, x, return_dict=False)[0]
        u = scheduler.step(network(u, other), other, u, return_dict=False)[0]
        y = scheduler.step(network(y, t), t, y, return_dict=False)[0]
        v = scheduler.step(network(v, other), other, v, return_dict=False)[0]
    for found, wanted in zip((x, y, u, v), alone * 2, strict=True):
        assert torch.equal(found, wanted)


def test_a_second_pass_needs_no_set_timesteps() -> None:
    """diffusers' schedulers raise IndexError there."""
    scheduler = made()
    scheduler.set_timesteps(5)
    assert torch.equal(loop(scheduler, state()), loop(scheduler, state()))
    loop(scheduler, state(), scheduler.timesteps[:3])  # given up half way
    assert torch.equal(loop(scheduler, state()), loop(scheduler, state()))


def test_a_pipeline_may_replace_the_state_between_steps() -> None:
    scheduler = made(gamma=2.0)
    scheduler.set_timesteps(5)
    wanted = loop(scheduler, state())
    x = state()
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, return_dict=False)[0].clone()
    assert torch.equal(x, wanted)


def test_broken_orders_are_errors() -> None:
    scheduler = made(gamma=2.0)
    scheduler.set_timesteps(6)
    t, x = scheduler.timesteps, state()
    x1 = scheduler.step(x, t[0], x, return_dict=False)[0]
    with pytest.raises(
        ValueError, match=r"step 2 .* was given the state that step 1 .* needs: take the timesteps in order"
    ):
        scheduler.step(x, t[2], x1)
    with pytest.raises(ValueError, match="set_begin_index"):
        scheduler.step(x, t[2], x1.clone())
    x2 = scheduler.step(x, t[1], x1, return_dict=False)[0]
    with pytest.raises(ValueError, match="already taken from this state"):
        scheduler.step(x, t[1], x1)
    other = scheduler.step(x, t[0], x, return_dict=False)[0]
    scheduler.step(x, t[1], other, return_dict=False)
    with pytest.raises(ValueError, match="2 interleaved runs wait for step 2"):
        scheduler.step(x, t[2], x2.clone())
    with pytest.raises(ValueError, match="before set_timesteps"):
        made().step(x, 5, x)
    with pytest.raises(ValueError, match="is not one of this run's"):
        scheduler.step(x, 5, x)
    with pytest.raises(ValueError, match="6 timesteps"):
        scheduler.step(x, t, x)
    with pytest.raises(ValueError, match=r"timestep = None: pass an element of scheduler.timesteps"):
        scheduler.step(x, None, x)


def test_labels_of_a_flow_may_be_cut_to_integers() -> None:
    """SkyReels' diffusion forcing keeps them so; the step is that of the label, where only one is cut to it."""
    scheduler = made("flow_prediction", shift=8.0, gamma=2.0)
    scheduler.set_timesteps(5)
    x = state()
    want = loop(scheduler, x)
    got = x
    for t, whole in zip(scheduler.timesteps, scheduler.timesteps.long(), strict=True):
        got = scheduler.step(network(got, t), whole, got, return_dict=False)[0]
    assert torch.equal(got, want)
    assert any(t != int(t) for t in scheduler.timesteps.tolist())
    scheduler.set_timesteps(sigmas=[0.5, 0.4004, 0.4001])
    with pytest.raises(ValueError, match="ambiguous: it stands 2 times"):
        scheduler.step(x, 400, x)


def test_a_plan_without_memory_takes_its_steps_in_any_order() -> None:
    """Windows of a long video, each a new tensor at the same timestep: DDIM needs no history, so nothing is refused."""
    scheduler = made(gamma=1.0)
    scheduler.set_timesteps(6)
    x, y = state(0), state(1)
    both = loop(scheduler, torch.cat([x, y]))
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x.clone(), return_dict=False)[0]
        y = scheduler.step(network(y, t), t, y.clone(), return_dict=False)[0]
    assert torch.equal(both, torch.cat([x, y]))
    t = scheduler.timesteps
    assert torch.equal(scheduler.step(x, t[4], x)[0], scheduler.step(x, t[4], x)[0])


def test_a_number_that_only_other_runs_have() -> None:
    scheduler = made()
    scheduler.set_timesteps(timesteps=[900, 500])
    scheduler.set_timesteps(timesteps=[900, 400])
    scheduler.set_timesteps(timesteps=[800, 300])
    x = state()
    scheduler.step(x, 400, x)
    with pytest.raises(ValueError, match="ambiguous: 2 runs have it"):
        scheduler.step(x, 900, x)


def test_a_trajectory_lives_as_long_as_one_of_its_timesteps() -> None:
    """However many came after it; of those that nobody holds, the last 32 are kept for numbers."""
    scheduler = made(gamma=2.0)
    scheduler.set_timesteps(4)
    wanted = loop(scheduler, state())
    scheduler.set_timesteps(4)
    held, seen = list(scheduler.timesteps), []
    x = scheduler.step(network(state(), held[0]), held[0], state(), return_dict=False)[0]
    for n in range(40):
        scheduler.set_timesteps(timesteps=[900 - n, 100])
        seen.append(weakref.ref(scheduler._current))
    gc.collect()
    assert [run() is None for run in seen] == [True] * 8 + [False] * 32
    assert torch.equal(loop(scheduler, x, held[1:]), wanted)  # with what it remembers of its first step
    first = weakref.ref(scheduler._trajectories.find(held[0])[0])
    del held
    gc.collect()
    assert first() is None
    scheduler.step(x, 900 - 10, x)
    with pytest.raises(ValueError, match="is not one of this run's"):
        scheduler.step(x, 900, x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_timesteps_are_known_in_every_mode(mode, monkeypatch) -> None:
    """Also where they are made: no value is read."""
    with mode():
        scheduler = made(gamma=2.0)
        scheduler.set_timesteps(4)
        monkeypatch.setattr(trajectory.Trajectories, "_by_value", None)
        views = [*scheduler.timesteps, *(t.expand(3) for t in scheduler.timesteps), *scheduler.timesteps[1:]]
        found = [scheduler._trajectories.find(t)[1] for t in views]
    assert found == [0, 1, 2, 3, 0, 1, 2, 3, 1, 2, 3]


def test_a_task_keeps_its_own_timesteps() -> None:
    """Those of a context that others were copied from, or that set theirs later, are another matter."""
    scheduler, inside = made(), contextvars.copy_context()
    inside.run(scheduler.set_timesteps, 4)
    for n in range(5, 50):
        scheduler.set_timesteps(n)
    assert len(scheduler.timesteps) == 49
    assert inside.run(lambda: len(scheduler.timesteps)) == 4
    child = inside.run(contextvars.copy_context)
    child.run(scheduler.set_timesteps, 3)
    assert [one.run(lambda: len(scheduler.timesteps)) for one in (inside, child)] == [4, 3]
    own = inside.run(copy.deepcopy, scheduler)
    assert len(own.timesteps) == 4
    kept = weakref.ref(own._current)
    del own
    gc.collect()
    assert kept() is None  # a scheduler that is gone leaves nothing in any context


def test_what_is_kept_of_runs_is_bounded(monkeypatch) -> None:
    """A run keeps the estimates that its rows read; finished runs keep none, and few are kept that were given up."""
    monkeypatch.setattr(trajectory, "RUNS", 4)
    scheduler = made(solver="ipndm")
    scheduler.set_timesteps(12)
    kept = scheduler._current._runs
    x = loop(scheduler, state(), scheduler.timesteps[:9])
    assert [len(run.history) for run in kept] == [3]
    loop(scheduler, x, scheduler.timesteps[9:])
    assert kept == []
    for seed in range(7):
        loop(scheduler, state(seed), scheduler.timesteps[:2])
    assert len(kept) == 4


def test_a_forgotten_estimate_makes_room_for_the_next() -> None:
    """Its memory is written again, not freed: new pages cost more than arithmetic.  The states handed out are new."""
    scheduler = made(solver="ipndm")
    scheduler.set_timesteps(9)
    kept, places, x = scheduler._current._runs, set(), state()
    out = []
    for t in scheduler.timesteps[:-1]:
        x = scheduler.step(network(x, t), t, x, return_dict=False)[0]
        out.append((x, x.clone()))
        places |= {estimate.data_ptr() for estimate in kept[0].history if estimate is not None}
    assert len(places) == 3
    assert all(torch.equal(now, then) for now, then in out)
    assert not places & {x.data_ptr() for x, _ in out}


@pytest.mark.parametrize("options", [{"gamma": 2.0}, {"solver": "ipndm"}])
def test_gradients_flow_through_a_whole_loop(options) -> None:
    """Nothing that a gradient needs is written over.  With F = z/2 the end is linear: grad . x = v . end(x)."""
    scheduler = made("v_prediction", **options)
    x = state().double().requires_grad_()
    v = state(1).double()

    def end(z: Tensor) -> Tensor:
        scheduler.set_timesteps(7)
        for t in scheduler.timesteps:
            z = scheduler.step(0.5 * z, t, z, return_dict=False)[0]
        return z

    end(x).backward(v)
    assert torch.allclose((x.grad * x).sum(), (v * end(x.detach())).sum(), rtol=1e-12)


def test_inference_mode_may_end_in_the_middle_of_a_loop() -> None:
    scheduler = made(solver="ipndm")
    scheduler.set_timesteps(8)
    whole = loop(scheduler, state(), scheduler.timesteps)
    with torch.inference_mode():
        half = loop(scheduler, state(), scheduler.timesteps[:5])
    assert torch.equal(loop(scheduler, half.clone(), scheduler.timesteps[5:]), whole)


def test_a_late_start_beside_a_run_that_was_given_up() -> None:
    """Skipping a step is an error; a pipeline that says where it begins may begin there."""
    scheduler = made(gamma=2.0)
    scheduler.set_timesteps(6)
    alone = loop(scheduler, state(1), scheduler.timesteps[3:])
    loop(scheduler, state(), scheduler.timesteps[:1])
    with pytest.raises(ValueError, match=r"call set_begin_index\(3\) to start there"):
        loop(scheduler, state(1), scheduler.timesteps[3:])
    scheduler.set_begin_index(3)
    assert torch.equal(loop(scheduler, state(1), scheduler.timesteps[3:]), alone)


def test_replaced_states_of_two_batches_are_told_apart_by_their_shape() -> None:
    scheduler = made(gamma=2.0)
    scheduler.set_timesteps(5)
    large, small = state(0), state(1, (1, 3, 8, 8))
    wanted = loop(scheduler, large), loop(scheduler, small)
    for t in scheduler.timesteps:
        large, small = (scheduler.step(network(x, t), t, x, return_dict=False)[0].clone() for x in (large, small))
    assert all(torch.equal(a, b) for a, b in zip((large, small), wanted, strict=True))


def test_a_number_that_stands_twice_in_a_run_is_the_one_that_the_run_waits_for() -> None:
    """Two levels within the rounding of the table's last timestep have one label."""
    scheduler = made(gamma=2.0)
    scheduler.set_timesteps(sigmas=[14.7, 14.65, 3.0, 0.5, 0.0])
    labels = scheduler.timesteps.tolist()
    assert labels[0] == labels[1] == 999
    wanted = loop(scheduler, state())
    x = scheduler.step(network(state(), 999), scheduler.timesteps[0], state(), return_dict=False)[0]
    assert torch.equal(loop(scheduler, x, labels[1:]), wanted)


def test_threads_see_their_own_timesteps() -> None:
    scheduler = made(gamma=2.0)
    wanted = {}
    for n in range(3, 11):
        scheduler.set_timesteps(n)
        wanted[n] = loop(scheduler, state(n))
    found: dict[int, list[Tensor]] = {n: [] for n in wanted}
    gate = threading.Barrier(8)

    def work(n: int) -> None:
        for _ in range(20):
            gate.wait()
            scheduler.set_timesteps(n)
            gate.wait()
            found[n].append(loop(scheduler, state(n)) if scheduler.num_inference_steps == n else torch.empty(0))

    threads = [threading.Thread(target=work, args=(n,)) for n in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(x, wanted[n]) for n in wanted for x in found[n])
    assert all(len(images) == 20 for images in found.values())


def test_threads_along_one_trajectory() -> None:
    """One `set_timesteps`, eight loops over its timesteps at once: runs are told apart by their states."""
    scheduler = made(gamma=2.0)
    scheduler.set_timesteps(20)
    timesteps = scheduler.timesteps
    wanted = [loop(scheduler, state(seed), timesteps) for seed in range(8)]
    found: dict[int, Tensor] = {}
    threads = [
        threading.Thread(target=lambda seed=seed: found.update({seed: loop(scheduler, state(seed), timesteps)}))
        for seed in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], wanted[seed]) for seed in range(8))


def test_a_step_that_failed_may_be_taken_again() -> None:
    scheduler = made(gamma=2.0, mu=0.2)
    scheduler.set_timesteps(4)
    wanted = loop(scheduler, state(), generator=torch.Generator().manual_seed(0))
    x, generator = state(), torch.Generator().manual_seed(0)
    for i, t in enumerate(scheduler.timesteps):
        if i < 3:  # the last step draws nothing
            with pytest.raises((TypeError, AttributeError)):
                scheduler.step(network(x, t), t, x, generator="none")
        x = scheduler.step(network(x, t), t, x.clone(), generator=generator, return_dict=False)[0]
    assert torch.equal(x, wanted)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))], ids=["deep", "pickle"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_copies_go_on_from_where_they_were_made(kind: str, copied) -> None:
    scheduler = made(kind, gamma=2.0, thresholding=True)
    scheduler.set_timesteps(5)
    wanted = loop(scheduler, state())
    x = loop(scheduler, state(), scheduler.timesteps[:3])
    twin = copied(scheduler)
    assert torch.equal(loop(twin, x, twin.timesteps[3:]), wanted)
    assert torch.equal(loop(scheduler, x, scheduler.timesteps[3:]), wanted)
    assert copied(made(kind)).config.prediction_type == kind
