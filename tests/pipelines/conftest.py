"""Models of the golden cases as users hold them."""

import pytest

from dar_jax.pipelines.dar import DarPipeline, PriorPipeline, TokenizerPipeline
from tests.golden import models


@pytest.fixture(scope="module")
def tokenizer():
    return TokenizerPipeline(*models.tokenizer("dar/tokenizer_tiny"))


@pytest.fixture(scope="module")
def prior():
    return PriorPipeline(*models.prior("dar/gpt_tiny"))


@pytest.fixture(scope="module")
def captions_prior():
    return PriorPipeline(*models.prior("dar/gpt_t2i_tiny"))


@pytest.fixture(scope="module")
def dar(prior, tokenizer):
    return DarPipeline(prior, tokenizer)
