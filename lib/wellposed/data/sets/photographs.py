"""Seven photographs that come with scikit-image, cut into tiles."""

from __future__ import annotations

from pathlib import Path

from wellposed.data.card import DataCard, DataFile, Dataset
from wellposed.data.sources import Installed
from wellposed.data.store import verified

TILE = 64
TRAIN_SHARE = 0.75  # the upper part of each photograph

CARD = DataCard(
    name="photographs",
    title="Seven photographs from scikit-image",
    notes="Tiles of 64 x 64 pixels that do not overlap; the upper three quarters of each "
    "photograph train, the rest tests, and the label says which photograph a tile is from. "
    "brick, camera and coins are gray, with three equal channels. brick is by CC0Textures, camera "
    "by Lav Varshney, chelsea by Stefan van der Walt, coffee by Rachel Michetti (all CC0); "
    "astronaut is by NASA and rocket by SpaceX (public domain); coins is from the Brooklyn Museum "
    "(no known copyright restrictions).",
    license="CC0 and public domain",
    license_url="https://creativecommons.org/publicdomain/zero/1.0/",
    citation=(
        "S. van der Walt et al. scikit-image: image processing in Python. PeerJ 2:e453, 2014. "
        "https://doi.org/10.7717/peerj.453"
    ),
    homepage="https://scikit-image.org/docs/stable/api/skimage.data.html",
    train=269,
    test=80,
    image=(3, TILE, TILE),
    classes=("astronaut", "brick", "camera", "chelsea", "coffee", "coins", "rocket"),
    files=(
        DataFile(
            "astronaut.png",
            791555,
            "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
        ),
        DataFile(
            "brick.png",
            106634,
            "7966caf324f6ba843118d98f7a07746d22f6a343430add0233eca5f6eaaa8fcf",
        ),
        DataFile(
            "camera.png",
            139512,
            "b0793d2adda0fa6ae899c03989482bff9a42d3d5690fc7e3648f2795d730c23a",
        ),
        DataFile(
            "chelsea.png",
            240512,
            "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
        ),
        DataFile(
            "coffee.png",
            466706,
            "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
        ),
        DataFile(
            "coins.png",
            75825,
            "f8d773fc9cfa6f4d8e5942dc34d0a0788fcaed2a4fefbbed0aef5398d7ef4cba",
        ),
        DataFile(
            "rocket.jpg",
            112525,
            "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
        ),
    ),
    sources=(Installed(package="skimage", folder="data", distribution="scikit-image"),),
)


def read(folder: Path) -> Dataset:
    """Return the tiles of the photographs whose files are in ``folder``."""
    import io

    import numpy as np
    import torch
    from PIL import Image

    parts: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    content = verified(CARD, folder)
    for file in CARD.files:
        picture = np.array(Image.open(io.BytesIO(content[file.name])).convert("RGB"))
        image = torch.from_numpy(picture).permute(2, 0, 1)
        border = round(TRAIN_SHARE * image.shape[1])
        for tiles, part in zip(parts, (image[:, :border], image[:, border:])):
            cut = part.unfold(1, TILE, TILE).unfold(2, TILE, TILE)
            tiles.append(cut.permute(1, 2, 0, 3, 4).reshape(-1, *CARD.image))
    (x, y), (x_test, y_test) = (
        (
            torch.cat(tiles).float().div_(255.0).contiguous(),
            torch.arange(len(tiles)).repeat_interleave(torch.tensor([len(t) for t in tiles])),
        )
        for tiles in parts
    )
    return Dataset(CARD.name, CARD.classes, x, y, x_test, y_test)
