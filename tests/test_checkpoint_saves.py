"""When a save is due, what may be saved, and what is told and kept where a save fails or is interrupted."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_cases import KEY

from jdiff import checkpoint
from jdiff.checkpoint import _together, store


def test_when_a_save_is_due(tmp_path):
    tree = {"params": jnp.zeros(1)}
    with checkpoint.open_manager(tmp_path, keep=1, every=3) as manager:
        assert [checkpoint.save(manager, n, tree) for n in range(1, 5)] == [False, False, True, False]
        assert checkpoint.save(manager, 4, tree, force=True)
        assert not checkpoint.save(manager, 4, tree, force=True)
        manager.wait_until_finished()
        assert manager.all_steps() == [4]
        assert [path.name for path in tmp_path.iterdir()] == ["4"]  # nothing else beside the steps
        with pytest.raises(ValueError, match=r"already holds steps \[4\]: restore before saving step 3"):
            checkpoint.save(manager, 3, tree)
        with pytest.raises(ValueError, match=r'items\["step"\] is 5, but the step to save is 6'):
            checkpoint.save(manager, 6, {**tree, "step": 5})
    # A fresh run must not bury an older one.
    with checkpoint.open_manager(tmp_path, keep=1, every=3) as manager:
        with pytest.raises(ValueError, match="restore before saving step 3"):
            checkpoint.save(manager, 3, tree)
    with checkpoint.open_manager(tmp_path, read_only=True) as manager:
        with pytest.raises(ValueError, match="read_only"):
            checkpoint.save(manager, 6, tree)


def test_bad_settings_and_items_are_named(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        checkpoint.open_manager(tmp_path, keep=0, every=1)
    with pytest.raises(ValueError, match="every must be at least 1"):
        checkpoint.open_manager(tmp_path, keep=1, every=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        checkpoint.open_manager(tmp_path / "file", keep=1, every=1)
    with checkpoint.open_manager(tmp_path / "new", keep=1, every=1) as manager:
        for bad, match in {
            "params/a must be a numeric array, got float": {"params": {"a": 1.0}},
            "params/a must be a numeric array, got key<fry>": {"params": {"a": KEY}},
            "meta must be JSON or bytes": {"meta": {"process": object()}},
            "data must be JSON or bytes": {"data": np.arange(3)},
        }.items():
            with pytest.raises(TypeError, match=bad):
                checkpoint.save(manager, 1, match)
        with pytest.raises(TypeError, match="meta must be a JSON object, got list"):
            checkpoint.save(manager, 1, {"meta": [1]})
        with pytest.raises(TypeError, match="manager must be what open_manager returns, got PosixPath"):
            checkpoint.save(tmp_path, 1, {"params": jnp.ones(1)})
        with pytest.raises(ValueError, match=r"two leaves of params have the path 'a\.b'"):
            checkpoint.save(manager, 1, {"params": {"a": {"b": jnp.ones(1)}, "a.b": jnp.zeros(1)}})
        assert manager.all_steps() == []


@pytest.mark.parametrize(("text", "told"), [("No space\n  left", "No space left"), ("", "OSError")])
def test_a_save_that_fails_is_told_with_its_reason(tmp_path, monkeypatch, text, told):
    tree = {"params": jnp.zeros(1)}
    with checkpoint.open_manager(tmp_path / "new") as manager:
        assert (tmp_path / "new").is_dir()
        with monkeypatch.context() as patched:

            def save(*args, **kwargs):
                raise OSError(text)

            patched.setattr(checkpoint.Manager, "save", save)
            with pytest.raises(checkpoint.SaveError, match=f"step 3 could not be written to .*new: {told}$"):
                checkpoint.save(manager, 3, tree)
            patched.setattr(checkpoint.manager.ocp.CheckpointManager, "__init__", save)
            with pytest.raises(checkpoint.SaveError, match=f"step 3 could not be written to .*new: {told}$"):
                checkpoint.save(manager, 3, tree)  # and the folder cannot be opened again
        assert checkpoint.save(manager, 3, tree)


def test_processes_with_different_data_are_told(tmp_path, monkeypatch):
    with checkpoint.open_manager(tmp_path) as manager, monkeypatch.context() as patched:
        patched.setattr(jax, "process_count", lambda: 2)
        patched.setattr(store.multihost_utils, "process_allgather", lambda digest: np.stack([digest, digest[::-1]]))
        with pytest.raises(ValueError, match="data and meta must be the same in every process"):
            checkpoint.save(manager, 1, {"data": {"position": 3}})


def test_a_barrier_after_a_failure_lets_nobody_through(monkeypatch):
    """Neither where the names differ nor afterwards: what comes behind it is that a step is made complete."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    barrier, names = _together.Barrier("here"), [{"written"}, {"written", "begun"}]
    monkeypatch.setattr(barrier, "_names", lambda key, timeout: names.pop(0))
    barrier(key="written", timeout_ms=1)
    for _ in range(2):
        with pytest.raises(_together.OtherProcessError):
            barrier(key="written", timeout_ms=1)
    assert not names


def test_a_step_is_whole_though_older_ones_cannot_be_deleted(tmp_path):
    def refuse(steps):
        raise OSError("in use")

    with checkpoint.open_manager(str(tmp_path), keep=1) as manager:
        checkpoint.save(manager, 1, {"a": jnp.ones(3)})
        manager.wait_until_finished()
        manager._checkpoint_deleter.delete_steps = refuse
        checkpoint.save(manager, 2, {"a": jnp.zeros(3)})
        with pytest.raises(checkpoint.SaveError, match=r"step 2 was written to .*, but not what follows it: .*in use"):
            manager.wait_until_finished()
        assert not checkpoint.save(manager, 2, {"a": jnp.zeros(3)}, force=True)
        np.testing.assert_array_equal(checkpoint.restore(manager, {"a": jnp.ones(3)})["a"], 0)


def test_an_interrupted_wait_does_not_write_again_what_is_there(tmp_path, monkeypatch):
    """Ctrl-C while a save is waited for: Orbax forgets the step, and would delete it to write it again."""

    def interrupt():
        thread.join(60)
        raise KeyboardInterrupt

    with checkpoint.open_manager(str(tmp_path)) as manager:
        checkpoint.save(manager, 1, {"a": jnp.ones(3)})
        thread = manager._finalize_thread.get_not_none()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(
                manager._finalize_thread,
                "get_not_none",
                lambda: types.SimpleNamespace(step=thread.step, name=thread.name, join=interrupt),
            )
            manager.wait_until_finished()
        assert not checkpoint.save(manager, 1, {"a": jnp.ones(3)}, force=True)
        assert manager.all_steps() == [1]
