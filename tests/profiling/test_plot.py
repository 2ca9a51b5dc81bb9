"""The plot of sensitivity."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emoe.errors import UsageError
from emoe.prediction.protocol import RoutingShape
from emoe.profiling.plot import check_plot, plot_sensitivity
from emoe.tasks.keywords import Keywords
from emoe.tasks.profile import Profile
from emoe.tasks.sensitivity import Sensitivity


def profile(known: Sensitivity) -> Profile:
    return Profile("ab", RoutingShape(3, 4, 2), ("qa", "chat"), Keywords({}), {}, known, {})


def known() -> Sensitivity:
    curves = {"qa": np.array([1.0, 0.9, 0.5]), "chat": np.array([1.2, 0.4, -0.1])}
    return Sensitivity("agreement", {"agreement": curves, "perplexity": curves}, 3)


def test_a_plot_is_an_image(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_sensitivity(profile(known()), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    plot_sensitivity(profile(known()), tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    assert "<svg" in text


def test_what_cannot_be_drawn_is_refused_beforehand(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(UsageError, match=r"give a \.png, \.svg, \.pdf file"):
        check_plot(tmp_path / "plot.txt")
    with pytest.raises(UsageError, match="in a folder that exists"):
        check_plot(tmp_path / "none" / "plot.png")
    with pytest.raises(UsageError, match="holds no sensitivity"):
        plot_sensitivity(profile(Sensitivity.unknown(3)), tmp_path / "plot.png")


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "matplotlib":
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"emoe\[plot\]"):
        check_plot(tmp_path / "plot.png")
