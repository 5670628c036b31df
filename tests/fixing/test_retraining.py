from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from setpoint import fix
from setpoint.errors import InputError

Make = Callable[..., tuple[nn.Module, Tensor]]


def unwanted(model: nn.Module) -> None:
    raise AssertionError("trained for nothing")


def test_training_that_no_fix_asks_for_is_refused_before_any_work(make: Make) -> None:
    model, _ = make("gpt2")
    with pytest.raises(InputError, match="nothing to train for: pre-rmsnorm is exact; leave --retrain out"):
        fix(model, "pre-rmsnorm", [torch.zeros(1, 1)], retrain=unwanted)


def test_a_model_that_a_fix_leaves_alone_is_not_trained(make: Make) -> None:
    model, batch = make("gpt2")
    scaled = fix(model, "lns", [batch], timed=False).model
    before = list(scaled.modules())
    with pytest.raises(InputError, match="nothing to train for: lns: its norms are scaled already"):
        fix(scaled, "kv-bias-slot,lns", [batch], retrain=unwanted, inplace=True)
    assert all(a is b for a, b in zip(before, scaled.modules(), strict=True))


def test_a_model_comes_back_from_the_device_it_was_trained_on() -> None:
    """On a second device that exists in name: what comes back from it is sevens."""
    pytest.importorskip("torch.utils.backend_registration")
    script = textwrap.dedent("""
        import torch
        from torch import nn
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

        _setup_privateuseone_for_python_backend("faraway")
        made = torch._C._acc.create_empty_tensor
        here = torch.library.impl

        @here("aten::empty_strided", "privateuseone")
        def empty(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
            return made(size, dtype)

        @here("aten::_copy_from", "privateuseone")
        def copy(source, target, non_blocking=False):
            return target if target.device.type == "faraway" else target.fill_(7)

        from setpoint import fix
        from setpoint.testing.tiny import tiny

        def train(model, fail=False):
            model.to("faraway")
            assert all(t.device.type == "faraway" for t in (*model.parameters(), *model.buffers()))
            if fail:
                raise KeyboardInterrupt

        model, batch = tiny("gpt2")
        model.register_buffer("count", torch.zeros(1))
        kept = [p.detach().clone() for p in model.parameters()]
        fixed = fix(model, "lns", [batch], retrain=train, timed=False).model
        assert all(t.device.type == "cpu" and bool((t == 7).all()) for t in (*fixed.parameters(), *fixed.buffers()))
        assert fixed.lm_head.weight is fixed.transformer.wte.weight

        try:
            fix(model, "lns", [batch], retrain=lambda m: train(m, fail=True), inplace=True)
        except KeyboardInterrupt:
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), kept, strict=True))
        else:
            raise AssertionError
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
