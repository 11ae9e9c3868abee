"""Try a sampler of your own, without editing the package: DDIM with noise (arXiv 2010.02502, eq. 16).

    python examples/add_sampler.py --eta 0.5

A sampler is a table of coefficients: x_next = on_xt x_t + on_x0 x_0 + std noise, where x_0 is the network's estimate.
To offer it in HTTP, Python and the command line, follow docs/architecture.md, "Add a sampler".
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from robuq_core import Sampler
from robuq_core.decode import to_pixels
from robuq_core.diffusion.samplers import StepTable, step_table
from robuq_core.diffusion.schedule import alphas_cumprod, to_sample_coefficients


def noisy_ddim(steps: int, eta: float) -> StepTable:
    """DDIM's table with noise of ``eta`` times DDPM's deviation; 0 is DDIM itself."""
    ddim = step_table("ddim", steps)
    now = alphas_cumprod()[list(map(int, ddim.timesteps))]
    following = torch.cat([now[1:], now.new_ones(1)])
    std = eta * ((1 - following) / (1 - now) * (1 - now / following)).sqrt()
    on_xt = ((1 - following - std**2) / (1 - now)).sqrt()
    on_x0 = following.sqrt() - on_xt * now.sqrt()
    fields = {name: getattr(ddim, name) for name in ddim.__dataclass_fields__}
    return StepTable(**fields | {"std": std, "on_xt": on_xt, "on_x0": on_x0, "stochastic": eta > 0})


@torch.inference_mode()
def generate(sampler: Sampler, table: StepTable, class_id: int, seed: int) -> torch.Tensor:
    """One image of ``class_id`` without guidance: the loop that ``Sampler`` runs for its own tables."""
    model, diffusion = sampler.header.model, sampler.header.diffusion
    noise = torch.Generator().manual_seed(seed)
    x = torch.randn(1, model.in_channels, model.input_size, model.input_size, generator=noise)
    on_xt, on_output = to_sample_coefficients(table.signal, table.sigma, diffusion.prediction_type)
    for i, timestep in enumerate(table.timesteps):
        output = sampler.model.forward(x, [timestep], [class_id])
        x0 = on_xt[i].float() * x + on_output[i].float() * output[:, : model.in_channels]
        x0 = x0.clamp(-1, 1) if diffusion.clip_sample else x0
        x = table.on_xt[i].float() * x + table.on_x0[i].float() * x0
        if table.std[i] > 0:
            x = x + table.std[i].float() * torch.randn(x.shape, generator=noise)
    return x[0]


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--eta", type=float, default=0.5)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--class-id", type=int, default=207)
parser.add_argument("--out", type=Path, default=Path("noisy_ddim.png"))
arguments = parser.parse_args()

sampler = Sampler.from_checkpoint()
ours = generate(sampler, noisy_ddim(arguments.steps, arguments.eta), arguments.class_id, arguments.seed)
plain = generate(sampler, step_table("ddim", arguments.steps), arguments.class_id, arguments.seed)
Image.fromarray(to_pixels(sampler.decode_float(ours))).save(arguments.out)
print(f"wrote {arguments.out}; RMS difference from DDIM: {(ours - plain).square().mean().sqrt():.4f}")
