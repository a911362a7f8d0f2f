"""What every launch of a kernel has: that it lets the next one in early, where the GPU can."""

import jax
import jax.numpy as jnp
import pytest

from realm_jax.errors import RealmError
from realm_jax.kernels import pallas
from realm_jax.kernels.pallas import Shape, load, program_id, store


def _double(x_ref, y_ref) -> None:
    row = program_id(0)
    store(y_ref.at[row], load(x_ref.at[row]) * 2)


def lowered(rows: int) -> str:
    """Of other rows each time, since equal launches are traced once."""
    x = Shape((rows,), jnp.float32)
    double = jax.jit(lambda x: pallas.call(_double, [x], Shape(x.shape, x.dtype), grid=(rows,), num_warps=1))
    return double.trace(x).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.usefixtures("for_an_h200")
def test_the_next_launch_is_let_in_once_from_hopper_up(monkeypatch):
    for rows, capability, count in ((3, "8.9", 0), (4, "9.0", 1), (5, "12.0", 1)):
        monkeypatch.setattr(pallas, "capability", lambda capability=capability: capability)
        assert lowered(rows).count("griddepcontrol.launch_dependents") == count


@pytest.mark.usefixtures("for_an_h200")
def test_it_can_be_switched_off(monkeypatch):
    monkeypatch.setattr(pallas, "capability", lambda: "9.0")
    monkeypatch.setenv(pallas.OVERLAP, "0")
    assert "griddepcontrol" not in lowered(6)
    monkeypatch.setenv(pallas.OVERLAP, "no")
    with pytest.raises(RealmError, match="REALM_OVERLAP is 'no'; want 0 or 1"):
        lowered(7)


def test_the_interpreter_has_no_launches():
    with pallas.interpreted():
        assert not pallas.overlaps()
        x = jnp.arange(8.0)
        y = pallas.call(_double, [x], Shape(x.shape, x.dtype), grid=(8,), num_warps=1)
    assert y.tolist() == (2 * x).tolist()
