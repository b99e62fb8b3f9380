"""The twelve classes: what images of each one usually look like."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from numpy.random import Generator

from contradiff.toy.colours import Hsv, Rgb
from contradiff.toy.objects import DRAWINGS, Shape


@dataclass(frozen=True)
class Scene:
    """A background whose colour changes from top to bottom: slowly, or at a soft horizon."""

    top: Hsv
    bottom: Hsv
    has_horizon: bool


SCENES: dict[str, Scene] = {
    "sky": Scene((0.58, 0.55, 0.9), (0.54, 0.15, 0.98), has_horizon=False),
    "water": Scene((0.5, 0.45, 0.85), (0.6, 0.8, 0.45), has_horizon=False),
    "sea": Scene((0.56, 0.25, 0.95), (0.57, 0.65, 0.6), has_horizon=True),
    "meadow": Scene((0.55, 0.3, 0.95), (0.27, 0.55, 0.62), has_horizon=True),
    "beach": Scene((0.5, 0.4, 0.85), (0.11, 0.38, 0.88), has_horizon=True),
    "forest": Scene((0.27, 0.45, 0.55), (0.3, 0.55, 0.22), has_horizon=False),
    "night": Scene((0.66, 0.65, 0.14), (0.63, 0.55, 0.38), has_horizon=False),
    "dusk": Scene((0.74, 0.4, 0.5), (0.06, 0.55, 0.95), has_horizon=False),
    "room": Scene((0.1, 0.18, 0.84), (0.07, 0.5, 0.52), has_horizon=True),
    "street": Scene((0.58, 0.12, 0.86), (0.62, 0.06, 0.42), has_horizon=True),
    "sand": Scene((0.12, 0.28, 0.93), (0.09, 0.42, 0.76), has_horizon=False),
    "studio": Scene((0.6, 0.03, 0.86), (0.6, 0.05, 0.6), has_horizon=False),
}


@dataclass(frozen=True)
class ToyClass:
    """A class of the toy ImageNet.

    Attributes:
        wnid: Folder name, in the style of a WordNet identifier.
        name: Names as in Kaggle's LOC_synset_mapping.txt, separated by commas.
        draw: Makes the shapes from a generator, a main and an accent colour.
        palette: Typical main colours; a colour that occurs twice is twice as likely.
        accents: Typical accent colours.
        scenes: Typical backgrounds, keys of `SCENES`.
        tilt: Standard deviation of the rotation in radians; infinity stands for any angle.
    """

    wnid: str
    name: str
    draw: Callable[[Generator, Rgb, Rgb], list[Shape]]
    palette: tuple[str, ...]
    accents: tuple[str, ...]
    scenes: tuple[str, ...]
    tilt: float


# name | main colours | accent colours | backgrounds | tilt
_TABLE = """
goldfish, fish | orange orange gold red snow | snow soot blue | water water sea | 0.25
butterfly | orange yellow sky violet snow | yellow snow soot pink | meadow forest sky | 0.5
mushroom, toadstool | red red brown clay cream | cream snow | forest forest meadow | 0.15
tree | green pine lime orange gold | brown brown slate | meadow meadow sky dusk | 0.06
house, cottage | cream snow clay sky gold | clay red slate brown | meadow street dusk | 0.05
sailboat, sailing boat | snow snow cream red gold | brown blue red snow | sea sea dusk | 0.14
sunflower, daisy | gold yellow yellow snow pink | brown soot gold | meadow sky forest | inf
cup, teacup | snow cream blue teal red | blue gold pink | room room studio | 0.08
starfish, sea star | orange red pink violet gold | cream yellow | sand water beach | inf
car, automobile | red blue snow slate teal yellow | yellow snow | street street beach meadow | 0.08
hot-air balloon | red yellow violet teal orange | yellow snow blue red | sky sky dusk | 0.12
crescent moon, crescent | yellow cream snow gold | yellow snow | night night dusk | 0.5
"""


def _read_table() -> Iterator[ToyClass]:
    for number, (line, draw) in enumerate(
        zip(_TABLE.strip().splitlines(), DRAWINGS, strict=True), start=1
    ):
        name, palette, accents, scenes, tilt = line.split(" | ")
        yield ToyClass(
            wnid=f"n{90_000_000 + number}",
            name=name,
            draw=draw,
            palette=tuple(palette.split()),
            accents=tuple(accents.split()),
            scenes=tuple(scenes.split()),
            tilt=float(tilt),
        )


CLASSES = tuple(_read_table())
