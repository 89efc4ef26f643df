"""Camera, radar and lidar in bird's eye view: where the other car is, where it will be, and which way to go.

Three sensors watch the road ahead, each drawn as a map seen from above. The camera knows a car's side but blurs its
distance, and sees the blinker; radar knows distance and, by the Doppler shift, speed, but blurs the side; lidar is
exact, and says neither. Tokens of the three maps attend to each other (TransFuser; Chitta et al., 2022; maps as in
BEVFusion; Liu et al., 2023) by `joint_attention`, which does not build their concatenation; a sensor that has failed is
a stream of length 0. The model says where the neighbour is and will be for three seconds; the planner takes the first
of six paths that stays clear of that. All that moves obeys the rules in `drive`: no data are needed.

    python examples/driving.py
"""

from __future__ import annotations

import sys

import torch
from common import Example
from torch import Tensor, nn

SENSORS, CELLS, PATCH, WIDTH, HEADS, LAYERS = ["camera", "radar", "lidar"], 16, 4, 32, 4, 2
ACROSS, AHEAD, LANE = 16.0, 48.0, 4.0  # metres of the map, of a lane
TIMES = torch.arange(7) / 2  # seconds
BLUR = [(2.0, 8.0), (5.0, 3.0), (1.0, 1.5)]  # metres by which each sensor smears a car, across and ahead
CLEAR, MARGIN = (2.2, 6.0), 1.3  # metres between two cars that touch, across and ahead; the planner keeps more
PATHS = [(side, brake) for brake in (0.0, 3.0) for side in (0.0, -LANE, LANE)]  # change of lane, m/s² of braking


def drive(count: int) -> tuple[list[Tensor], Tensor]:
    """Maps [count, 3, CELLS, CELLS] of the three sensors, and the neighbour's path [count, 7, 2] as seen from us.

    A map's channels are how much is there, its speed (radar alone) and its blinker (camera alone).
    """
    lane, turn = torch.randint(-1, 2, (2, count)).prod(0), torch.randint(-1, 2, (count,))
    turn = torch.where((lane + turn).abs() > 1, 0, turn)
    speed = -10 + 14 * torch.rand(count)  # m/s, relative to ours
    start = torch.stack([LANE * lane + 0.4 * torch.randn(count), 8 + 30 * torch.rand(count)], -1)
    moved = (TIMES / 2).clamp_max(1)  # a lane is changed in two seconds
    path = torch.stack([start[:, :1] + LANE * turn[:, None] * moved, start[:, 1:] + speed[:, None] * TIMES], -1)
    x = (torch.arange(CELLS) + 0.5) * ACROSS / CELLS - ACROSS / 2
    y = (torch.arange(CELLS) + 0.5) * AHEAD / CELLS
    maps = []
    for sensor, (across, ahead) in enumerate(BLUR):
        seen = start + torch.randn(count, 2) * torch.tensor([across, ahead]) / 4
        heat = torch.exp(-(((x - seen[:, :1]) / across) ** 2))[:, None] * torch.exp(
            -(((y - seen[:, 1:]) / ahead) ** 2)
        ).unsqueeze(-1)
        if sensor == 2:
            heat = heat * (torch.rand(heat.shape) < 1.4 - y[:, None] / 40)  # far points return no light
        kinds = torch.stack([torch.ones(count), (sensor == 1) * speed / 10, (sensor == 0) * turn], -1)
        maps.append(heat[:, None] * kinds[..., None, None] + 0.1 * torch.randn(count, 3, CELLS, CELLS))
    return maps, path


class Road(nn.Module):
    def __init__(self, ops) -> None:
        super().__init__()
        self.ops, streams = ops, len(SENSORS) + 1
        self.see = nn.ModuleList(nn.Conv2d(3, WIDTH, PATCH, PATCH) for _ in SENSORS)
        self.place = nn.Parameter(0.1 * torch.randn((CELLS // PATCH) ** 2, WIDTH))
        self.asked = nn.Parameter(torch.randn(1, 4, WIDTH))  # the fourth stream: what we ask of the sensors
        self.layers = nn.ModuleList(
            nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(streams)) for _ in range(LAYERS)
        )
        self.head = nn.Sequential(nn.Linear(4 * WIDTH, 64), nn.ReLU(), nn.Linear(64, 2 * len(TIMES)))

    def forward(self, maps, working):
        """The neighbour's path [B, 7, 2]; a sensor that is not `working` [B, 3] is not read."""
        streams = [(see(m).flatten(2).mT + self.place).relu() for see, m in zip(self.see, maps, strict=True)]
        streams.append(self.asked.expand(len(working), -1, -1))
        lengths = [*(working * len(self.place)).unbind(1), None]
        for layer in self.layers:
            split = [
                project(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
                for project, x in zip(layer, streams, strict=True)
            ]
            query, key, value = map(list, zip(*split, strict=True))  # of [B, HEADS, L, WIDTH / HEADS], one a stream
            read = self.ops.joint_attention(query, key, value, key_lengths=lengths)
            streams = [x + r.transpose(1, 2).flatten(2) for x, r in zip(streams, read, strict=True)]
        path = self.head(streams[-1].flatten(1)).unflatten(-1, (len(TIMES), 2))
        return path * torch.tensor([ACROSS, AHEAD]) / 4

    def loss(self, maps, working, path):
        return ((self(maps, working) - path) / torch.tensor(CLEAR)).abs().mean()


def ours(side: float, brake: float) -> Tensor:
    """Where we are [7, 2], as seen by one who keeps lane and speed."""
    return torch.stack([side * (TIMES / 2).clamp_max(1), -brake * TIMES**2 / 2], -1)


def touch(path: Tensor, other: Tensor, margin: float = 1.0) -> Tensor:
    """[count]: whether paths [count, 7, 2] come closer than `margin` times CLEAR."""
    return ((path - other).abs() < margin * torch.tensor(CLEAR)).all(-1).any(-1)


def plan(other: Tensor) -> Tensor:
    """[count, 7, 2]: the first of PATHS that keeps MARGIN from the predicted one; if none does, brake."""
    paths = torch.stack([ours(*path) for path in PATHS])
    bad = torch.stack([touch(path, other, MARGIN) for path in paths], -1)
    return paths[torch.where(bad.all(-1), 3, bad.int().argmin(-1))]


def main(argv: list[str] | None = None) -> int:
    example = Example(__doc__, argv)

    def batch(step: int):
        maps, path = drive(32)
        failed = torch.where(torch.rand(32) < 0.4, torch.randint(3, (32,)), -1)
        return maps, torch.arange(3) != failed[:, None], path

    model = example.train("road", Road, batch, example.steps(900, quick=300), lr=5e-3)
    maps, path = drive(2000)
    noise = [maps[0], torch.randn_like(maps[1]), maps[2]]
    cases = {"all three": (maps, -1), **{f"no {name}": (maps, i) for i, name in enumerate(SENSORS)}}
    cases["radar sends noise, and is believed"] = noise, -1
    keeps = touch(ours(0, 0), path).float().mean().item()
    rows, seen = [["(keep lane and speed)", "-", "-", keeps], ["(know the other's path)", 0.0, 0.0, 0.0]], {}
    rows[1][3] = touch(plan(path), path).float().mean().item()
    with torch.no_grad():
        for name, (read, failed) in cases.items():
            seen[name] = model(read, (torch.arange(3) != failed).expand(len(path), -1))
            apart = (seen[name] - path).norm(dim=-1).mean(0)
            rows.append([name, apart[0].item(), apart[-1].item(), touch(plan(seen[name]), path).float().mean().item()])
    example.table(["sensors", "metres off now", "metres off in 3 s", "crashes"], rows)
    result = {row[0]: row[1:] for row in rows}
    example.check("with all sensors there are less than half of the crashes", result["all three"][2] < keeps / 2)
    lost = {name: result[f"no {name}"][1] - result[f"no {name}"][0] for name in SENSORS}
    example.check("it is radar that knows what comes next", max(lost, key=lost.get) == "radar")
    believed = result["radar sends noise, and is believed"][1]
    example.check("a radar known to have failed does less harm than one believed", result["no radar"][1] < believed)
    shown = int((touch(ours(0, 0), path) & ~touch(plan(seen["all three"]), path)).int().argmax())
    with example.picture(1, 4, size=(8, 4)) as axes:
        for axis, name, kind in zip(axes, SENSORS, maps, strict=False):
            axis.imshow(kind[shown, 0].tolist(), origin="lower", extent=(-8, 8, 0, AHEAD), cmap="Greys", aspect="auto")
            axis.plot(0, 0, "C0s", clip_on=False)
            axis.set(title=f"{name} sees", ylim=(-12, AHEAD), xlim=(-8, 8), xlabel="metres to the right")
        for side in (-LANE / 2, LANE / 2):
            axes[3].axvline(side, color="0.8", ls="--")
        axes[3].plot(*path[shown].T.tolist(), color="0.6", lw=6, label="other car")
        axes[3].plot(*seen["all three"][shown].T.tolist(), "C3o-", ms=4, label="as foreseen")
        axes[3].plot(*plan(seen["all three"][shown : shown + 1])[0].T.tolist(), "C0s-", ms=4, label="our plan")
        axes[3].set(title="next 3 seconds", ylim=(-12, AHEAD), xlim=(-8, 8), xlabel="metres to the right")
        axes[3].legend(fontsize="small")
        axes[0].set_ylabel("metres ahead of us")
    return example.finish()


if __name__ == "__main__":
    sys.exit(main())
