"""English technical prose, from files that come with scikit-learn."""

from __future__ import annotations

from wellposed.data.card import DataCard, DataFile
from wellposed.data.sources import Installed

_FILES = (
    # name, bytes, sha256 of the files in scikit-learn 1.9.1
    (
        "metrics/_classification.py",
        154811,
        "e9cbb3811a13a2f69e51ae97d27605d4b28d5bdbcb5c136b63df7eaca2ada0a0",
    ),
    (
        "ensemble/_forest.py",
        119473,
        "ddf75afd3c1fb4d1b29e5154436ec1684e8969bffed4eef4718af53e2260ca7c",
    ),
    (
        "preprocessing/_data.py",
        130712,
        "4e4588e51cf26364c0b28c1ee7694a9029798a6c6e34b1098bcbac1149da0325",
    ),
    (
        "linear_model/_coordinate_descent.py",
        120189,
        "14d218ac4d3a65c12ebc99517712dcf5f587cffddca4bf24b67ffc319a45ce44",
    ),
    (
        "model_selection/_split.py",
        112741,
        "78072f5c87abc9c42f88d49596b0db087643737b073841f8b8b2797588418ad6",
    ),
    ("svm/_classes.py", 68141, "06b89760e22b5df441820f531a9989edfdf22bd5e405a68c5a33fb39e60644b9"),
    (
        "metrics/_ranking.py",
        89136,
        "b1d16d4108a66708dd797ecead322f4bfce290d7f08eb2e659eb61721a94ed15",
    ),
    (
        "metrics/pairwise.py",
        92367,
        "5dea05d1237d57d62f5235af78a3dec1b4f27c239c0adc3c2088a7eaf409600e",
    ),
    (
        "linear_model/_ridge.py",
        109277,
        "dc0e50f313834c8ea00213d9f86a6e29849df0c557260bdae72c8399b0170a86",
    ),
    ("tree/_classes.py", 77225, "12d05b5c28d0c4bb5f6dd166354842f6d3895b33066c4491a953d0a648525794"),
    (
        "model_selection/_validation.py",
        96083,
        "9b4b212d0f8bfe7d87c4fbfa769439631f1a31f50789e2e7d5ced3a8c53a0ef6",
    ),
    (
        "gaussian_process/kernels.py",
        85311,
        "e985326714f38ab7a6c7cbe10a9eb3409fdcec198c1708de2194fe979bf54f7b",
    ),
    (
        "cluster/_kmeans.py",
        82531,
        "ff5e7d3e333699a6ee9012677e816bc4822105377bc5f5668b857b577e616c2c",
    ),
    (
        "feature_extraction/text.py",
        77448,
        "72f4e2036ba93c466f979f3721cc260c7236dab680471fa722616d6019b89adc",
    ),
    ("pipeline.py", 88267, "cbc04a4053d5a8e97ca3d78e8b23e7cb8abb21aa81dbebb9647f9b492f63485d"),
    ("ensemble/_gb.py", 87833, "db94251d7db7e82964c1877d04dd7d7bca726fad98f8770c96fc3d427d48975a"),
    (
        "model_selection/_search.py",
        85371,
        "0c56d4465db4757ff978f72555cafdf47e8e134de671843d53e44b24cb41869c",
    ),
    (
        "linear_model/_logistic.py",
        99667,
        "1f4a019bfad745184ddf29f0ada8719e3f0a24c6659901683480ab6052f9915f",
    ),
    (
        "metrics/_regression.py",
        67044,
        "25f6428181257089fbc13a89d8270862ce4f72cfb218eb67fa437084aed016a5",
    ),
    (
        "cluster/_agglomerative.py",
        49491,
        "376bdded8baca44dc3f4f72adb4d2ced76991f1e2b8539c963eb2517f569e317",
    ),
    (
        "datasets/_samples_generator.py",
        77213,
        "18b8eb782e78df1058ad3b70a926e49d1c01e23726856a75e48c99e37498ab15",
    ),
    (
        "manifold/_t_sne.py",
        43913,
        "b5be05e65e615fa910efe886529f853e322b187f3ade52362166cdd7cb4e0d16",
    ),
    (
        "linear_model/_stochastic_gradient.py",
        94072,
        "fe08ecdcd342763068891884c72dda52da6eff26079fd4bbe3a30c3d9017e07a",
    ),
    (
        "covariance/_shrunk_covariance.py",
        28079,
        "f1b3e23de01bb2400bbbac45bdab0197cbe5c526abe03075689bf86c698c661d",
    ),
    (
        "cluster/_spectral.py",
        31014,
        "4ca9bd434e238bf0751065e1dcfbcdca20ff9d4e1356bf4adf46a9cb865abe10",
    ),
    (
        "neighbors/_classification.py",
        35154,
        "1c1a959b897813fab761b5a11245d420a818396cc64525b063f4c11ba6a41a90",
    ),
    (
        "ensemble/_hist_gradient_boosting/gradient_boosting.py",
        92859,
        "82619e3ae89af1625dea1d4245d0d4a9e2eb85e0d034790fbd89a1bb51d7e996",
    ),
    (
        "decomposition/_pca.py",
        34219,
        "65a2cdedafdc2becedba140d219461201c8777aef35235e383ab221f3df70c6f",
    ),
    (
        "decomposition/_dict_learning.py",
        78693,
        "31ec5d0cb9b601ca5c98ae0910d6d7169349f1ddb5e727f4772897bd8e776154",
    ),
    (
        "decomposition/_nmf.py",
        81635,
        "786d1f17240cdec5dd2ecc1ceef52b6da3f5456ba3006dd73ac912094a5a5603",
    ),
    (
        "impute/_iterative.py",
        38719,
        "1e98118ca895255be2f716e0e146a7f96a2376132505b8e805abb1397d19e542",
    ),
    (
        "inspection/_partial_dependence.py",
        33267,
        "391e789e52a2e1aed9f53962d161369a4214113adda9baa0845ee8e566917274",
    ),
    (
        "utils/validation.py",
        111995,
        "2f74707eb561f15a571f57281403a30c628a5cf09787bbe4cafe60b909cfdfd2",
    ),
    (
        "mixture/_gaussian_mixture.py",
        35752,
        "860b3d3f32645fbdc37042eb844ed8826b6e08b06f3c5301250a0c95ef4e5a46",
    ),
    (
        "cross_decomposition/_pls.py",
        37009,
        "b51bf54a640ec99c58d597d98e3218223bdf9ce4c77c2cd0415b6ac12b7a5386",
    ),
    ("calibration.py", 61543, "52339970c65ed05602a8515ebbbdacb2fef1ef24fc683cbace7683fd964269e9"),
    ("multioutput.py", 43577, "605d39cc694e891fca743f905016650eb1536fcbfca7e03d2cef923becbe6210"),
    (
        "ensemble/_bagging.py",
        52904,
        "e15f586fa47403406ff0b47220b55468d8f7b0a10dedea2e5509a24f1e2c8572",
    ),
    (
        "ensemble/_weight_boosting.py",
        39740,
        "fc949d5c7e3619ad5051c6406252f805165e61b419c64e38774d9fa11de3357c",
    ),
    (
        "utils/multiclass.py",
        21283,
        "8661343072b72b8625eefaf74b2a01af252afde39b45e642c59f3ec89ca4635e",
    ),
    ("base.py", 49206, "ff5dd28da53337f80e92925542e6a07d1aa49cb325b7f5636cd9c56d5f26b44f"),
)

CARD = DataCard(
    name="english-docstrings",
    title="English prose in the docstrings of scikit-learn",
    notes="Lines of at least five words, mostly letters, each line once; lower case. New versions "
    "of scikit-learn change files, and then the checksums here want renewing.",
    license="BSD-3-Clause",
    license_url="https://github.com/scikit-learn/scikit-learn/blob/main/COPYING",
    citation=(
        "F. Pedregosa et al. Scikit-learn: Machine Learning in Python. Journal of Machine Learning "
        "Research 12, 2011."
    ),
    homepage="https://scikit-learn.org",
    train=447397,
    test=0,
    image=(),
    classes=(),
    unit="characters",
    reader="wellposed.data.text.english_text",
    files=tuple(DataFile(*row) for row in _FILES),
    sources=(Installed(package="sklearn", folder=".", distribution="scikit-learn"),),
)
