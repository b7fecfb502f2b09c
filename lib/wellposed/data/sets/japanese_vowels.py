"""Recordings of two vowels as short series, which come with sktime."""

from __future__ import annotations

from wellposed.data.card import DataCard, DataFile
from wellposed.data.sources import Installed

CARD = DataCard(
    name="japanese-vowels",
    title="Japanese vowels",
    notes="Nine men say the vowels 'a' and 'e'; twelve linear prediction cepstrum coefficients at "
    "each of 7 to 29 steps. The label is the speaker. No entry is missing.",
    license="CC BY 4.0",
    license_url="https://creativecommons.org/licenses/by/4.0/",
    citation=(
        "M. Kudo, J. Toyama, M. Shimbo. Multidimensional curve classification using "
        "passing-through regions. Pattern Recognition Letters 20(11-13), 1999."
    ),
    homepage="https://archive.ics.uci.edu/dataset/128/japanese+vowels",
    train=270,
    test=370,
    image=(29, 12),
    classes=tuple("123456789"),
    unit="series",
    reader="wellposed.data.series.japanese_vowels",
    files=(
        DataFile(
            "JapaneseVowels_TRAIN.ts",
            487971,
            "68a430eabd919cc77f40b1f5f3bc0dcafacc1486bca9260785aeb7d262cc78cd",
        ),
        DataFile(
            "JapaneseVowels_TEST.ts",
            649132,
            "b3d41d6a0ca3bcad3afb9ca7d4365382aa51341e2e58bae2a574babdda5b9462",
        ),
    ),
    sources=(
        Installed(package="sktime", folder="datasets/data/JapaneseVowels", distribution="sktime"),
    ),
)
