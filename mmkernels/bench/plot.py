"""The run as a picture: one panel per group and dtype, bars in GF/s against the GEMM's rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .engine import Row
from .report import geometric_mean, times

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS, TORCH, COMPILED = "#d1495b", "#5f7a94", "#b9c6d3"
INK, FAINT = "#22303c", "#e6e9ee"


def save_plot(path: Path, op: str, rows: Sequence[Row], baseline: str, caption: str) -> None:
    """Write one op's rows as a PNG. Rows without a time (wrong results) are left out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    rows = [row for row in rows if row.op == op and "ours" in row.seconds]
    groups = list(dict.fromkeys(row.group for row in rows))
    dtypes = list(dict.fromkeys(row.setting for row in rows))
    if not rows:
        return
    panels = {(g, d): [r for r in rows if (r.group, r.setting) == (g, d)] for g in groups for d in dtypes}
    tallest = [max(len(panels[g, d]) for d in dtypes) for g in groups]
    height = sum(tallest) * 0.42 + len(groups) * 0.75 + 1.7
    plt.rcParams.update(
        {"font.size": 9, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK}
    )
    figure, axes = plt.subplots(
        len(groups),
        len(dtypes),
        figsize=(3.2 + 4.9 * len(dtypes), height),
        squeeze=False,
        sharex="col",
        gridspec_kw={"height_ratios": [n + 0.6 for n in tallest]},
        layout="constrained",
    )
    series = (("ours", "mmkernels", OURS), ("torch", baseline, TORCH), ("compiled", "torch.compile of eager", COMPILED))
    for i, group in enumerate(groups):
        for j, dtype in enumerate(dtypes):
            axis, members = axes[i][j], panels[group, dtype]
            _panel(axis, members, series, labels=j == 0)
            mean = geometric_mean(row.speedup("torch") for row in members)
            axis.set_title(f"{group}, {dtype}", loc="left", fontweight="bold", fontsize=10)
            axis.set_title(f"{times(mean)} over {baseline} (geometric mean)", loc="right", fontsize=9, color=OURS)
    for axis in axes[-1]:
        axis.set_xlabel("GF/s   (dashed: a plain matrix product)")
    handles = [Rectangle((0, 0), 1, 1, color=color) for _, _, color in series]
    figure.legend(
        handles, [name for _, name, _ in series], loc="outside upper right", ncols=3, frameon=False, fontsize=10
    )
    figure.suptitle(f"{op}\n\n", x=0.01, ha="left", fontsize=15, fontweight="bold")
    figure.text(0.011, 1 - 0.46 / height, caption, fontsize=9, va="top")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _panel(axis: Axes, members: Sequence[Row], series: Sequence[tuple[str, str, str]], labels: bool) -> None:
    """Bars of one group and dtype, the first shape on top."""
    thick = 0.27
    for k, (name, _, color) in enumerate(series):
        for y, row in enumerate(members):
            if name in row.seconds:
                axis.barh(y + (k - 1) * thick, row.flops / row.seconds[name] / 1e9, thick * 0.92, color=color, zorder=2)
    for y, row in enumerate(members):
        axis.annotate(
            times(row.speedup("torch")),
            (row.gflops, y - thick),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
            color=OURS,
        )
    if members:
        axis.axvline(members[0].peak / 1e9, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    axis.set_yticks(range(len(members)), [f"{row.note}\n{row.shape}" for row in members] if labels else [])
    axis.tick_params(axis="y", length=0, labelsize=7.5)
    axis.tick_params(axis="x", length=0, labelbottom=True)
    axis.set_ylim(max(len(members), 1) - 0.45, -0.55)
    axis.grid(axis="x", color=FAINT, zorder=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(FAINT)
    axis.margins(x=0.12)
