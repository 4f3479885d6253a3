"""Float32 in full precision, whichever precision the run has chosen, and the run's choice is restored."""

import warnings

import pytest
import torch
from torch import nn
from torch.backends import cuda, cudnn, mkldnn

from lightning_conv import NTKOperator, ntk_gram
from lightning_conv.networks.undisturbed import undisturbed

PLACES = {
    "cuda.matmul": cuda.matmul,
    "cudnn.conv": cudnn.conv,
    "cudnn.rnn": cudnn.rnn,
    "mkldnn.matmul": mkldnn.matmul,
    "mkldnn.conv": mkldnn.conv,
    "mkldnn.rnn": mkldnn.rnn,
}


def chosen():
    """Return every setting; a refusal of torch to read one, because two interfaces were used, is part of the result."""

    def read(get):
        try:
            return get()
        except RuntimeError:
            return "refused"

    found = {name: place.fp32_precision for name, place in PLACES.items()}
    found |= {"all": torch.backends.fp32_precision, "mkldnn": mkldnn.fp32_precision, "cudnn": cudnn.fp32_precision}
    found["matmul"] = read(torch.get_float32_matmul_precision)
    return found | {"tf32": read(lambda: cudnn.allow_tf32), "cuda": read(lambda: cuda.matmul.allow_tf32)}


@pytest.fixture(autouse=True)
def defaults():
    def restore():
        torch.backends.fp32_precision = "none"
        mkldnn.set_flags(_fp32_precision="none")
        cudnn.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        for place in PLACES.values():
            place.fp32_precision = "none"
        cudnn.allow_tf32 = True

    restore()
    yield
    restore()


def matmul_medium():
    torch.set_float32_matmul_precision("medium")


def matmul_high():
    torch.set_float32_matmul_precision("high")


def legacy_cuda():
    cuda.matmul.allow_tf32 = True


def new_matmul():
    mkldnn.matmul.fp32_precision = "bf16"
    cuda.matmul.fp32_precision = "tf32"


def new_convolutions():
    mkldnn.conv.fp32_precision = "bf16"


def new_cudnn_convolutions():
    cudnn.conv.fp32_precision = "ieee"


def no_tf32():
    cudnn.allow_tf32 = False


def everything():
    torch.backends.fp32_precision = "bf16"


def everything_tf32():
    torch.backends.fp32_precision = "tf32"


def all_of_mkldnn():
    mkldnn.set_flags(_fp32_precision="bf16")


def nothing():
    pass


SETTINGS = [
    nothing,
    matmul_medium,
    matmul_high,
    legacy_cuda,
    new_matmul,
    new_convolutions,
    new_cudnn_convolutions,
    no_tf32,
    everything,
    everything_tf32,
    all_of_mkldnn,
]


@pytest.mark.parametrize("choose", SETTINGS)
def test_no_product_is_in_less_than_full_precision_and_the_runs_settings_are_put_back(choose):
    choose()
    before = chosen()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with undisturbed(nn.Linear(2, 1)):
                assert {place.fp32_precision for place in PLACES.values()} <= {"none", "ieee"}
                if before["tf32"] != "refused":
                    assert cudnn.allow_tf32 is False
                    with cudnn.flags(enabled=False):  # reads the older interface; some networks do this
                        pass
            assert chosen() == before


def test_an_operation_that_followed_the_setting_of_all_goes_on_following_it():
    everything()
    with undisturbed(nn.Linear(2, 1)):
        pass
    torch.backends.fp32_precision = "none"
    assert mkldnn.conv.fp32_precision == "none"


@pytest.mark.parametrize("choose", SETTINGS)
def test_the_kernel_of_a_convolutional_network_is_the_same_bits(choose):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.GELU(), nn.Conv2d(32, 32, 3), nn.GELU(), nn.Flatten(), nn.Linear(32 * 64, 2)
    )
    inputs = torch.randn(6, 3, 12, 12)
    vector = torch.randn(6, dtype=torch.float64)

    def measured():
        return ntk_gram(model, inputs, precision="fast").matrix, NTKOperator(model, inputs, outputs="sum") @ vector

    plain = measured()
    choose()
    assert all(torch.equal(a, b) for a, b in zip(measured(), plain, strict=True))
