"""One whole slide: tiles to confidences, one variational problem, files."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.inferers import Inferer

from monai_vslp.data.slides import Slide, open_slide
from monai_vslp.inferers.slide import SlideConfidence, network_predictor
from monai_vslp.inferers.slide_maps import SlideMaps
from monai_vslp.inferers.slide_refinement import REFINED, Given, RefinedMaps, Region, refine_maps
from monai_vslp.io.manifest import write_manifest
from monai_vslp.io.output import SLIDE_FORMATS, SegmentationOutput, write_output
from monai_vslp.io.regions import region_masks
from monai_vslp.transforms.overlay import default_colors
from monai_vslp.transforms.refinement import VariationalRefinement
from monai_vslp.variational.passes import Passes

__all__ = ["SlidePipeline"]

WORK = "tiles"  # folder inside the output that holds unfinished work until the slide is written


class SlidePipeline:
    """Segment a whole slide with its proportions as one problem.

    Tiles over tissue are read through cuCIM (other readers where it cannot), blended to maps of confidences on disk, refined
    there with the proportions of the whole tissue, or of regions, and written as :func:`monai_vslp.io.write_output` tells.
    Memory is bounded by tiles, not by the slide. Finished tiles, maps and the refined maps stay on disk until the slide is
    written, so an interrupted call goes on where it stopped.

    Args:
        network: gives logits ``[B, C, H, W]`` for images ``[B, 3, H, W]`` in [0, 1].
        inferer: fuses the network's views to mean and spread, ``[B, C + 1, H, W]``.
        refinement: the variational stage; its ``pixel_size`` is ``map_downsample``.
        classes: names in class order.
        colors: RGB per class; None for the default palette.
        mpp: µm/px that the network was trained at.
        tile: side of the tiles, px at ``mpp``.
        overlap: share of a tile that it has in common with the next.
        margin: border of a tile that is predicted but not blended, px at ``mpp``.
        batch_size: tiles per call of the network.
        map_downsample: px at ``mpp`` per px of the maps.
        reader: name of a slide reader, or ``auto``.
        formats: what is written, names in :data:`monai_vslp.io.output.WRITERS`.
        device: where the network runs.
        progress: show a progress bar.
        options: recorded in the summary.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        inferer: Inferer,
        refinement: VariationalRefinement,
        classes: Sequence[str],
        colors: Sequence[Sequence[int]] | None = None,
        mpp: float = 0.5,
        tile: int = 896,
        overlap: float = 0.125,
        margin: int = 0,
        batch_size: int = 4,
        map_downsample: int = 4,
        reader: str = "auto",
        formats: Sequence[str] = SLIDE_FORMATS,
        device: str | torch.device = "cpu",
        progress: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.predictor, self.refinement = network_predictor(network, inferer), refinement
        self.classes = list(classes)
        self.colors = default_colors(len(self.classes)) if colors is None else colors
        self.reader, self.formats = reader, tuple(formats)
        self.tiling = {
            "mpp": mpp,
            "tile": tile,
            "overlap": overlap,
            "margin": margin,
            "batch_size": batch_size,
            "map_downsample": map_downsample,
            "device": device,
            "progress": progress,
        }
        self.options = dict(options or {})

    def job(self, source: Slide, folder: str | Path, fingerprint: str | None) -> SlideConfidence:
        """The tiles of a slide, on their way to its maps in ``folder``."""
        return SlideConfidence(
            source, len(self.classes), work_dir=Path(folder) / WORK, fingerprint=str(fingerprint), **self.tiling
        )

    def predict(
        self,
        slide: str | Path,
        folder: str | Path,
        part: tuple[int, int] = (0, 1),
        *,
        source_mpp: float | None = None,
        fingerprint: str | None = None,
    ) -> int:
        """Compute some batches of tiles, which a call of the pipeline for the same slide then finds; any process may.

        Args:
            slide, folder, source_mpp, fingerprint: as of :meth:`__call__`.
            part: ``(k, n)`` for every n-th batch from the k-th.

        Returns:
            How many batches these are.
        """
        with open_slide(slide, self.reader, source_mpp) as source:
            job = self.job(source, folder, fingerprint)
            batches = range(part[0], len(job.batches), part[1])
            job.run(self.predictor, batches)
            return len(batches)

    def estimate(self, slide: str | Path, *, source_mpp: float | None = None) -> dict[str, Any]:
        """What a slide needs, without computing anything: tiles, shape of the maps, bytes on disk."""
        with open_slide(slide, self.reader, source_mpp) as source:
            return self.job(source, ".", None).estimate()

    def __call__(
        self,
        slide: str | Path,
        folder: str | Path,
        *,
        proportions: Sequence[float] | None = None,
        given_spread: Sequence[float] | None = None,
        given_bounds: Sequence[Sequence[float]] | None = None,
        regions: Mapping[str, Sequence[float] | None] | None = None,
        region_file: str | Path | None = None,
        source_mpp: float | None = None,
        fingerprint: str | None = None,
        passes: Passes | None = None,
        keep_maps: bool = False,
    ) -> Path:
        """
        Args:
            slide: the file.
            folder: where its outputs go.
            proportions: fractions of the tissue per class; None leaves them free. Where there are regions, those of the rest.
            given_spread: standard deviation between raters per class.
            given_bounds: lower and upper fractions per class.
            regions: proportions by name of region; see :func:`monai_vslp.io.regions.region_masks`.
            region_file: GeoJSON with their outlines; ``<slide>.regions.geojson`` beside the slide by default.
            source_mpp: µm per level-0 px, where the file does not say.
            fingerprint: names network and settings; tiles of another one are not reused.
            passes: who makes the passes of the variational solver; this process by default.
            keep_maps: leave the maps of confidences in the folder, so that a call with other proportions only refines.

        Returns:
            Path of ``summary.json``.

        Raises:
            SlideError: the slide cannot be read or does not say its µm/px.
            InputError: there is no tissue, or no such region.
            OSError: a full disk; finished tiles and maps are kept.
        """
        path, folder = Path(slide), Path(folder)
        clock = [time.perf_counter()]
        with open_slide(path, self.reader, source_mpp) as source:
            job = self.job(source, folder, fingerprint)
            job.run(self.predictor)
            maps = job.merge()
        clock.append(time.perf_counter())
        outlines = []
        if regions:
            file = path.with_name(f"{path.stem}.regions.geojson") if region_file is None else Path(region_file)
            masks = region_masks(list(regions), file, maps.mass, maps.downsample)
            outlines = [Region(name, *masks[name], Given(given)) for name, given in regions.items()]
        given = Given(proportions, given_spread, given_bounds)
        refined = refine_maps(maps, self.refinement, given, regions=outlines, passes=passes)
        clock.append(time.perf_counter())
        seconds = {"tiles": clock[1] - clock[0], "refinement": clock[2] - clock[1], **maps.seconds}
        output = self._output(path, maps, refined, given_spread, fingerprint, seconds)
        written = write_output(folder, output, self.formats)
        write_manifest(folder)
        shutil.rmtree(folder / WORK / REFINED, ignore_errors=True)
        (folder / WORK / "refined.json").unlink(missing_ok=True)
        if not keep_maps:
            maps.clear()
        return written

    def _output(
        self,
        path: Path,
        maps: SlideMaps,
        refined: RefinedMaps,
        given_spread: Sequence[float] | None,
        fingerprint: str | None,
        seconds: Mapping[str, float],
    ) -> SegmentationOutput:
        status = dict(refined.refinement)
        regularizer = status.pop("regularizer")
        facts = {"reader": maps.reader, "tiles": maps.tiles, "fingerprint": fingerprint, "solved_with": regularizer}
        regions = [
            {
                "name": region["name"],
                "given": region["proportions_given"],
                "refined": region["proportions_refined"],
                "psi": None if region["proportions_given"] is None else region["psi"],
                "residual": region["residual"],
                "tissue_fraction": region["tissue_fraction"],
            }
            for region in refined.regions
        ]
        return SegmentationOutput(
            name=path.stem,
            kind="slide",
            source=str(path),
            classes=self.classes,
            colors=self.colors,
            confidence=maps.confidence,
            segmentation=refined.array("u"),
            labels=refined.array("labels"),
            fidelity=refined.array("fidelity_energy"),
            regularization=refined.array("regularization_energy"),
            mass=maps.mass,
            image=maps.image,
            thumbnail=None,
            refinement=status,
            spread=maps.spread,
            given_spread=given_spread,
            regions=regions,
            views=maps.views,
            mpp=maps.mpp,
            downsample=maps.downsample,
            level0_shape=maps.level0_shape,
            options=self.options | facts,
            seconds=seconds,
        )
