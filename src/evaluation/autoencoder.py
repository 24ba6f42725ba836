"""How well an autoencoder reconstructs images, in full: Fréchet distance (rFID), PSNR, SSIM, L1, LPIPS."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import UserError, read_json, validate
from ..config.packages import ask_for
from ..data import ImageConfig, ImageSet
from ..losses import Perceptual, PerceptualConfig
from ..metrics.distances import Array
from ..runs.autoencoder import open_autoencoder
from ..runs.folders import run_name
from ..runtime.stream import to_network
from ..sampling.batches import in_batches
from ..storage.blocks import in_blocks
from ..storage.finite import is_finite
from .features import BLOCK, check_count, extract_features, join_batches, on_screen, pixel_loader, pixels_of
from .reconstruct import measure_distances, save_sheet
from .registry import FeatureSets, compare
from .results import Results, Setup


def evaluate_autoencoder(setup: Setup, run: str, settings: dict[str, Any], data: ImageSet, reference: str) -> Results:
    """Compare `data`, which `reference` names, with their reconstructions, at the size of the run's last stage: rFID in each of
    the features, PSNR, SSIM, L1 and the perceptual distance of the run; a sheet of the worst and of usual ones."""
    autoencoder = open_autoencoder(run, setup.device)
    check_count(len(data), "real images")
    ask_for("measuring reconstructions", "torchmetrics", "torchvision")
    spec = validate(ImageConfig, settings["image"], origin=f"{run}: image")
    image = replace(spec, size=settings["stages"][-1]["image_size"] or spec.size, crop="center", flip=False)
    notes, perceptual, lpips_network = list[str](), None, None
    try:
        perceptual_spec = validate(PerceptualConfig, settings["perceptual"], origin=f"{run}: perceptual")
        perceptual = Perceptual(perceptual_spec, sizes=[image.size]).to(setup.device)
        lpips_network = perceptual_spec.network
    except UserError as error:
        notes.append(f"no LPIPS: {error}")
    request = {"weights": autoencoder.digest, "pictures": data.fingerprint, "files": data.state, "size": image.size}
    request |= {"lpips": lpips_network, "batch_size": setup.batch_size}
    out = setup.claim(run_name(run), "reconstructions", request)
    progress = [place / "progress.json" for place in (Path(run), Path(run) / "final") if (place / "progress.json").exists()]
    step = read_json(progress[0])["step"] if progress else 0
    network, load = autoencoder.network, pixel_loader(data, image)

    @torch.no_grad()
    def reconstruct(indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images, and their reconstructions as 8-bit files would hold them."""
        images = to_network(torch.from_numpy(np.ascontiguousarray(load(indices))), setup.device)
        mean, _ = network.moments(images)
        outputs = network.decode(mean)
        if not is_finite(outputs):
            first = indices[int((~torch.isfinite(outputs.flatten(1)).all(1)).nonzero()[0])]
            name = data.parts[data.which[first]].names[int(data.index[first])]
            raise UserError(
                f"the reconstructions of {run} (step {step}) are not finite (NaN or infinity), first of the image {name}; "
                "measure an earlier checkpoint"
            )
        return images, to_network(pixels_of(outputs).permute(0, 2, 3, 1), setup.device)

    @torch.no_grad()
    def measure(part: range) -> dict[str, Array]:
        images, outputs = reconstruct(part)
        values = measure_distances(outputs, images, perceptual)
        distances = {name: value.cpu().numpy() for name, value in values.items()}
        return distances | {each.name: extract_features(each, pixels_of(outputs)) for each in setup.networks}

    def make(block: range) -> dict[str, Array]:
        return join_batches(map(measure, in_batches(block, setup.batch_size)))

    arrays = in_blocks(out, len(data), BLOCK, make, setup.ranks, doing="reconstructing")
    real = setup.real_features(data, image)
    results = Results(out, step)
    if not setup.computes:
        return results
    sets = [FeatureSets(each, arrays[each.name], real[each.name], neighbours=False) for each in setup.networks]
    results.add_table(
        f"{run}: {len(data)} {on_screen(reference)} of {image.size} px against their reconstructions "
        "(the Fréchet distance is rFID)",
        [compare(each) for each in sets],
    )
    units = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": f"LPIPS ({lpips_network})", "l1": "L1, of [-1, 1]"}
    means = {name: float(arrays[name].mean()) for name in units if name in arrays}
    results.lines += [f"  {units[name]:<29}{value:14.4g}" for name, value in means.items()]
    results.lines += [f"  note: {note}" for note in notes]
    results.values |= means
    results.document |= {**means, "real_pictures": len(data), "of": reference, "notes": notes}
    results.write()

    def draw(path: Path) -> None:
        order = np.argsort(arrays["psnr"], kind="stable")
        chosen = [*order[:6].tolist(), *order[len(order) // 2 :][:6].tolist()]
        save_sheet(path, *reconstruct(chosen), means, f"the {len(order[:6])} worst, then usual ones; ")

    results.add_sheet("reconstructions.png", draw)
    return results
