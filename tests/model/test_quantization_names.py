"""The choice of a repository's GGUF files by their quantisation."""

from __future__ import annotations

import pytest

from tercet.errors import UserError
from tercet.model.quantization_names import choose_files, is_model_file, quantization_of

REPOSITORY = [
    "README.md",
    "config.json",
    "imatrix_unsloth.dat",
    "mmproj-BF16.gguf",
    "Model-lora-Q8_0.gguf",
    "Model-Q4_K_M.gguf",
    "Model-Q4_K_S.gguf",
    "Model-IQ4_XS.gguf",
    "Model-UD-Q2_K_XL.gguf",
    "model.q8_0.gguf",
    "BF16/Model-BF16-00001-of-00002.gguf",
    "BF16/Model-BF16-00002-of-00002.gguf",
]


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "Q4_1"),
        ("qwen2.5-0.5b-instruct-q5_k_m.gguf", "Q5_K_M"),
        ("gemma-3-270m-it-UD-IQ2_XXS.gguf", "UD-IQ2_XXS"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("Phi-3-mini-4k-instruct-fp16.gguf", "F16"),
        ("Q6_K/Model-00001-of-00003.gguf", "Q6_K"),
        ("Model-f32.gguf", "F32"),
        ("tinyllama-1.1b-chat-v1.0.Q3_K_L.gguf", "Q3_K_L"),
        ("Llama-3.2-1B-Instruct-Q4_0_4_8.gguf", "Q4_0_4_8"),
        ("BitNet-b1.58-TQ2_0.gguf", "TQ2_0"),
        ("model.gguf", ""),
        ("Q4_Kitten.gguf", ""),
    ],
)
def test_the_quantisation_in_a_files_name(file: str, name: str) -> None:
    assert quantization_of(file) == name


def test_files_are_chosen_by_quantisation_in_any_case() -> None:
    for quantization, files in {
        "q4_k_m": ["Model-Q4_K_M.gguf"],
        "Q8_0": ["model.q8_0.gguf"],
        "bf16": REPOSITORY[-2:],
        "Q2_K_XL": ["Model-UD-Q2_K_XL.gguf"],
        "ud-q2_k_xl": ["Model-UD-Q2_K_XL.gguf"],
        "Model-Q4_K_S.gguf": ["Model-Q4_K_S.gguf"],
        "BF16/Model-BF16-00002-of-00002.gguf": REPOSITORY[-2:],
    }.items():
        assert choose_files("org/name", REPOSITORY, quantization) == files


def test_projectors_and_adapters_are_no_models() -> None:
    assert [file for file in REPOSITORY if is_model_file(file)] == REPOSITORY[5:]
    assert is_model_file("Explora-Q4_0.gguf")  # "lora" within a word
    with pytest.raises(UserError, match=r"has no mmproj-BF16.gguf"):
        choose_files("org/name", REPOSITORY, "mmproj-BF16.gguf")


def test_the_message_lists_what_there_is() -> None:
    with pytest.raises(UserError) as problem:
        choose_files("org/name", REPOSITORY, "Q4_K")
    assert str(problem.value) == (
        "org/name has no Q4_K; it has Q4_K_S, BF16, IQ4_XS, Q4_K_M, UD-Q2_K_XL, Q8_0; write, for example, "
        "org/name:Q4_K_S"
    )
    with pytest.raises(
        UserError, match=r"org/name has 2 models as Q8_0; name one: org/name/a-Q8_0.gguf, org/name/b-"
    ):
        choose_files("org/name", ["a-Q8_0.gguf", "b-Q8_0.gguf"], "Q8_0")
    with pytest.raises(UserError, match="org/name contains no GGUF files"):
        choose_files("org/name", ["model.safetensors"], "Q8_0")
