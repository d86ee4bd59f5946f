"""Why the routers of other mixture-of-experts models in transformers cannot be tuned here, each by the reason that holds for it."""

from __future__ import annotations

_INDEXER = "an indexer of its own chooses the tokens that its attention sees, which a packed pass cannot do for it"
_STREAMS = "its layers hand on several residual streams (hyper-connections), so no one state enters a layer"
_SCALED = (
    "its residual stream is scaled or gated at every block, so a block cannot be left out without changing the stream"
)
_DELTA = "its recurrent layers bear the name of attention (self_attn), by which a packed pass would let questions mix in them"
_DENSE_SCORES = (
    "its router returns dense scores of all experts, not the (logits, weights, indices) that the others return"
)
_ENCODER_DECODER = (
    "it is an encoder-decoder model: slices of two stacks, cross-attention, position biases that the first block makes for all, and "
    "a capacity by which one token's experts depend on the others, for checkpoints that only fill in spans. configs/switch_style.yaml "
    "is the decoder-only form of its routing"
)
_NO_CLASS = "transformers has its language model only inside a multimodal one, in a form that was not checked here"
_NOT_CAUSAL = "it is no causal language model: its attention looks both ways"
_NEW = "it came with transformers 5.24 and has not been held against its stock forward pass here"
_VISION = "it sees pictures and is no language model"

REASONS: dict[str, str] = {
    **dict.fromkeys(
        ("deepseek_v32", "glm_moe_dsa", "axk2", "dots3_note_text", "minimax_m3_vl_text", "mistral_large4_text"),
        _INDEXER,
    ),
    **dict.fromkeys(("deepseek_v4", "glm5_next_text", "hy_v4", "hy_v4_vl_text", "qwen4_exp_text"), _STREAMS),
    **dict.fromkeys(("minimax", "beam", "doge", "muse_spark_text"), _SCALED),
    **dict.fromkeys(("bailing_hybrid", "kimi_linear"), _DELTA),
    **dict.fromkeys(("llama4", "llama4_text"), _DENSE_SCORES),
    **dict.fromkeys(("switch_transformers", "nllb-moe"), _ENCODER_DECODER),
    **dict.fromkeys(("step3p5", "mistral4", "unlimited_ocr_text", "deepseek_ocr2_text"), _NO_CLASS),
    **dict.fromkeys(("openai_privacy_filter", "diffusion_gemma_text"), _NOT_CAUSAL),
    **dict.fromkeys(("lara_mini", "sarvam_mla", "sarvam_moe"), _NEW),
    **dict.fromkeys(("vitpose_backbone", "dots3_note_vision_encoder"), _VISION),
    **dict.fromkeys(
        ("qwen3_omni_moe_text", "qwen3_omni_moe_talker_text"),
        "it is a part of a model that listens and speaks, whose parts are not loaded alone",
    ),
    "phimoe": "its sparsemixer chooses experts through thresholds that pass no gradient to some routers in evaluation mode",
    "jetmoe": "it also routes inside its attention",
    "dbrx": "its router is not one gate with a softmax over experts that can be tuned alone",
    "longcat_flash": "it routes to zero-computation experts, with the choice made outside the gradient",
    "zaya": "its router is a network of several layers that hands a state on from layer to layer, not one gate",
    "cohere2_moe": "its attention and experts stand beside one another and read the same states (a parallel block), so there is no "
    "state after the attention to go on from",
    "jamba": "which of its layers attend and which have experts follows from periods that a slice's configuration cannot say",
    "kolibri1": "its router scores the chosen experts alone, so its routing cannot be replaced for the methods that do so",
    "inkling_text": "its shared experts share the normalisation of the chosen experts' weights, and short convolutions mix its tokens",
    "inkling2_text": "short convolutions mix its tokens, and its layers attend to the outputs of earlier layers",
    "inkling2_loop_text": "some of its layers run several times in one pass, so a slice of it is no range of layers",
    "ernie4_5_vl_moe_text": "it has two sets of experts and routers, for text and for pictures",
}
