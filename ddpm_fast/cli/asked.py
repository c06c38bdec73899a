"""What `ddpm-fast sample` is asked for: conditions, guidance, and parts of an image to be filled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ddpm_fast.cli.inputs import read_pictures
from ddpm_fast.cli.options import File, Integer, Number, Numbers, Range, UserError, Words, check_positive

if TYPE_CHECKING:
    import torch

    from ddpm_fast.diffusion.diffusion_process import DiffusionProcess

# A grid has at most so many rows where nobody says which classes it shows, and so many images of each.
_MAX_ROWS = 16
_COLUMNS_PER_CLASS = 8
_NUM_SAMPLES = 64
_NUM_INPAINTED = 8


@dataclasses.dataclass
class AskedOptions:
    """What is asked of a network that takes conditions."""

    classes: Annotated[Words, tyro.conf.arg(name="class")] = None
    """Classes by name or number, a row of the grid for each; by default all, or the first 16."""
    columns_per_class: Integer = None
    """Images of each class (8, or --num-samples shared among the classes)."""
    cond: Numbers = None
    """The vector of all images, as its columns were in training."""
    cond_images: File = None
    """An image, or a folder of them, which are the conditions of an image each."""
    guidance: Number = None
    """Guidance scale: 1 none, more is closer to what was asked for (the checkpoint's)."""
    guidance_interval: Range = None
    """Guide at noise levels above LOW up to HIGH only, sigma of the noise over the image's factor."""
    guidance_rescale: Number = None
    """Bring the contrast back that a large scale adds: 0 not, 1 wholly."""
    guidance_strip: Numbers = None
    """Also write NAME-guidance.png: a row for each class, a column for each of these scales, from the same noise."""
    inpaint: File = None
    """An image whose black parts of --mask are made anew (8 times, or --num-samples), in more than 10 --steps."""
    mask: File = None
    """White where --inpaint is kept, black where it is made anew."""
    upscale: File = None
    """A small image, or a folder of them, that a checkpoint of --super-resolution enlarges."""


@dataclasses.dataclass
class Drawing:
    """Images to draw.

    Args:
        count, columns: of the grid.
        inputs: tensors (count, ...) by argument of `method`, on the CPU.
        options: further arguments, the same for all images.
        method: `sample`, `upscale` or `inpaint` of a process.
        shown: (count, C, h, w), drawn before each image in the grid; None for nothing.
    """

    count: int
    columns: int
    method: Callable[..., torch.Tensor]
    inputs: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    shown: torch.Tensor | None = None

    def draw(self, start: int, end: int, device: torch.device, **options: Any) -> torch.Tensor:
        """Images from number `start` to `end`."""
        inputs: dict[str, Any] = {name: values[start:end].to(device) for name, values in self.inputs.items()}
        if self.method.__name__ == "sample":
            inputs["batch_size"] = end - start
        return self.method(**inputs, **self.options, start_index=start, **options)

    def first(self, count: int) -> list[tuple[int, int]]:
        """Where `count` images begin and end: the first of each row with classes, else the first ones together."""
        if "classes" not in self.inputs:
            return [(0, count)]
        return [(start, start + 1) for start in range(0, self.count, self.columns)][:count]


def drawing_of(diffusion: DiffusionProcess, options: AskedOptions, num_samples: int | None) -> Drawing:
    """What the options ask for.

    Raises:
        UserError: options do not fit each other or the checkpoint.
    """
    _check_together(options)
    if not _takes_classes(diffusion) and (options.classes is not None or options.columns_per_class is not None):
        option = "class" if options.classes is not None else "columns-per-class"
        raise UserError(f"--{option}: the checkpoint's network takes no classes")
    guidance = _guidance_of(diffusion, options)
    given: dict[str, Any] = {} if guidance is None else {"guidance": guidance}
    if options.upscale is not None:
        return _upscaling(diffusion, options, num_samples, given)
    if options.inpaint is not None:
        return _inpainting(diffusion, options, num_samples, given)
    conditions = None
    if options.cond_images is not None:
        conditions = _condition_images(diffusion, options.cond_images)
    count = num_samples or (_NUM_SAMPLES if conditions is None else len(conditions))
    columns = square(count)
    inputs = {}
    if _takes_classes(diffusion):
        count, columns, inputs["classes"] = _rows_of_classes(diffusion, options, num_samples)
    if conditions is not None:
        inputs["cond_image"] = conditions[[index % len(conditions) for index in range(count)]]
    inputs |= _vectors(diffusion, options.cond, count)
    return Drawing(count, columns, diffusion.sample, inputs, given)


def strip_of(diffusion: DiffusionProcess, options: AskedOptions) -> list[Drawing]:
    """A drawing of a row per class for each scale of --guidance-strip."""
    from ddpm_fast.diffusion.guidance import Guidance

    if not options.guidance_strip:
        return []
    if options.upscale is not None or options.inpaint is not None:
        raise UserError("--guidance-strip draws samples; it cannot be given with --upscale or --inpaint")
    if not _takes_classes(diffusion) and not getattr(diffusion.network, "cond_dim", None):
        raise UserError("--guidance-strip: the checkpoint's network takes no classes and no vectors")
    one = drawing_of(
        diffusion, dataclasses.replace(options, columns_per_class=1 if _takes_classes(diffusion) else None), None
    )
    if "classes" not in one.inputs:
        one = dataclasses.replace(one, count=1, inputs={name: values[:1] for name, values in one.inputs.items()})
    base = one.options.get("guidance") or Guidance()
    scaled = [dataclasses.replace(base, scale=scale) for scale in options.guidance_strip]
    return [dataclasses.replace(one, options={**one.options, "guidance": guidance}) for guidance in scaled]


def classes_of(asked: Sequence[str], diffusion: DiffusionProcess) -> list[int]:
    """The numbers of classes, of which names or numbers were given; a name comes first.

    Raises:
        UserError: an unknown one; those that are known are listed.
    """
    count, names = _num_classes(diffusion), diffusion.class_names
    if not count:
        raise UserError("--class: the checkpoint's network takes no classes")
    numbers = {str(number): number for number in range(count)}
    known = {**numbers, **{name: number for number, name in enumerate(names or ())}}
    for one in asked:
        if one not in known:
            listed = ", ".join(list(names or ())[:50]) + (", ..." if len(names or ()) > 50 else "")
            classes = f"{listed}, or their numbers 0 to {count - 1}" if names else f"0 to {count - 1}"
            raise UserError(f"--class {one} is unknown; the classes are {classes}")
    return [known[one] for one in asked]


def square(count: int) -> int:
    """Columns of a grid that is about square."""
    return max(1, round(count**0.5 + 0.49))


def _num_classes(diffusion: DiffusionProcess) -> int:
    return getattr(diffusion.network, "num_classes", None) or 0


def _takes_classes(diffusion: DiffusionProcess) -> bool:
    return _num_classes(diffusion) > 0


def _check_together(options: AskedOptions) -> None:
    if (options.inpaint is None) != (options.mask is None):
        raise UserError("--inpaint and --mask are given together")
    if options.inpaint is not None and options.upscale is not None:
        raise UserError("--inpaint cannot be given with --upscale")
    if options.upscale is not None and (options.cond is not None or options.cond_images is not None):
        raise UserError("--upscale makes the condition itself; --cond and --cond-images cannot be given with it")
    if options.columns_per_class is not None:
        check_positive(columns_per_class=options.columns_per_class)


def asked_classes(diffusion: DiffusionProcess, asked: Sequence[str] | None) -> list[int]:
    """Those that were named; else all, or the first ones if there are many; none where the network takes none."""
    if asked is not None:
        return classes_of(asked, diffusion)
    if not _takes_classes(diffusion):
        return []
    known = _num_classes(diffusion) if diffusion.class_names is None else len(diffusion.class_names)
    return list(range(min(known, _MAX_ROWS)))


def _rows_of_classes(
    diffusion: DiffusionProcess, options: AskedOptions, num_samples: int | None
) -> tuple[int, int, torch.Tensor]:
    """Images, columns, and classes (N,): a row for each class."""
    import torch

    if num_samples is not None and options.columns_per_class is not None:
        raise UserError("--num-samples cannot be given with --columns-per-class")
    classes = asked_classes(diffusion, options.classes)
    if num_samples is None:
        columns = options.columns_per_class or _COLUMNS_PER_CLASS
    else:
        columns, classes = max(1, num_samples // len(classes)), classes[:num_samples]
    return len(classes) * columns, columns, torch.tensor(classes).repeat_interleave(columns)


def _vectors(diffusion: DiffusionProcess, cond: tuple[float, ...] | None, count: int) -> dict[str, torch.Tensor]:
    """The vector of each image, where the network takes one."""
    import torch

    width = getattr(diffusion.network, "cond_dim", None)
    if cond is None:
        if width:
            raise UserError(f"--cond: the checkpoint's network takes a vector of {width} numbers; give it")
        return {}
    if len(cond) != width:
        takes = f"takes {width} numbers" if width else "takes no vector"
        raise UserError(f"--cond: the checkpoint's network {takes}; got {len(cond)}")
    return {"cond": torch.tensor(cond).expand(count, -1)}


def _condition_images(diffusion: DiffusionProcess, path: Path) -> torch.Tensor:
    channels = getattr(diffusion.network, "cond_channels", 0)
    if not channels:
        raise UserError("--cond-images: the checkpoint's network takes no images as conditions")
    height, width = diffusion.image_size
    return read_pictures("--cond-images", path, channels, (height, width))


def _guidance_of(diffusion: DiffusionProcess, options: AskedOptions) -> Any:
    """The guidance that the options ask for; None for the checkpoint's own."""
    from ddpm_fast.diffusion.guidance import Guidance, as_guidance

    named = {"scale": options.guidance, "interval": options.guidance_interval, "rescale": options.guidance_rescale}
    given: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    own = as_guidance(diffusion.guidance)
    if not given:
        return None
    if "scale" not in given and own is None and not options.guidance_strip:
        option = "interval" if "interval" in given else "rescale"
        raise UserError(f"--guidance-{option} needs --guidance, since the checkpoint has no scale of its own")
    return dataclasses.replace(own or Guidance(), **given)


def _upscaling(
    diffusion: DiffusionProcess, options: AskedOptions, num_samples: int | None, given: dict[str, Any]
) -> Drawing:
    """Each of the small images, beside itself enlarged by repeated pixels."""
    import torch

    factor = getattr(diffusion, "super_resolution", None)
    if factor is None or options.upscale is None:
        raise UserError("--upscale: the checkpoint was not trained with --super-resolution")
    height, width = diffusion.image_size
    low = read_pictures("--upscale", options.upscale, diffusion.channels, (height // factor, width // factor))
    low = low[:num_samples]
    inputs = {"low": low}
    if _takes_classes(diffusion):
        classes = classes_of(options.classes or (), diffusion)
        if len(classes) != 1:
            raise UserError(f"--upscale: the checkpoint's network takes classes; give one --class; got {len(classes)}")
        inputs["classes"] = torch.tensor(classes * len(low))
    enlarged = low.float().div(255).repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    return Drawing(len(low), square(len(low)), diffusion.upscale, inputs, given, enlarged)


def _inpainting(
    diffusion: DiffusionProcess, options: AskedOptions, num_samples: int | None, given: dict[str, Any]
) -> Drawing:
    """The image completed several times, beside what was known of it."""
    assert options.inpaint is not None and options.mask is not None
    height, width = diffusion.image_size
    image = read_pictures("--inpaint", options.inpaint, diffusion.channels, (height, width))[:1]
    mask = (read_pictures("--mask", options.mask, 1, (height, width))[:1] > 127).float()
    count, columns = num_samples or _NUM_INPAINTED, square(num_samples or _NUM_INPAINTED)
    inputs: dict[str, torch.Tensor] = {}
    if _takes_classes(diffusion):
        options = dataclasses.replace(options, columns_per_class=options.columns_per_class or count)
        count, columns, inputs["classes"] = _rows_of_classes(diffusion, options, None)
    inputs["image"] = image.expand(count, -1, -1, -1)
    inputs["mask"] = mask.expand(count, -1, -1, -1)
    inputs |= _vectors(diffusion, options.cond, count)
    if options.cond_images is not None:
        inputs["cond_image"] = _condition_images(diffusion, options.cond_images)[:1].expand(count, -1, -1, -1)
    return Drawing(count, columns, diffusion.inpaint, inputs, given)
