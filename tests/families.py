"""Every family of causal LM in transformers, tiny: 2 layers of width 32, as far as the usual names
can tell its configuration so."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

VOCABULARY = 61
SIZES = {  # by the names that families have for them; what a configuration lacks is left out
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size"), 32
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "decoder_attention_heads", "num_heads"), 4),
    **dict.fromkeys(("num_layers", "num_key_value_heads", "num_kv_heads", "moe_k"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "d_ff", "n_inner"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_sequence_length"), 128),
    **dict.fromkeys(("head_dim", "d_kv", "rotary_dim", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "global_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "moe_intermediate_size"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **{
        "shared_expert_intermediate_size": 16,
        "emb_dim": 32,
        "ffn_hidden_size": 64,
        "seq_length": 128,
    },
    **{
        "num_experts_per_tok": 2,
        "sliding_window": 5,
        "num_kv_shared_layers": 0,
        "is_decoder": True,
    },
    **{"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "initializer_range": 0.2},
    **{"init_std": 0.2, "tie_word_embeddings": False, "type_vocab_size": 2, "use_cache": True},
}
LATENT = {"num_key_value_heads": 4}  # multi-head latent attention has as many as heads


def tiny_family(name, sizes=SIZES):
    """A causal LM of the family with random weights, biases and norms included."""
    cls = CONFIG_MAPPING[name]
    names = {*cls().to_dict(), *getattr(cls, "attribute_map", {})}
    config = cls(**{key: value for key, value in sizes.items() if key in names})
    text = config.get_text_config()
    for key in sizes.keys() & vars(text).keys() if text is not config else ():
        setattr(text, key, sizes[key])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.ndim == 1):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def greedy(model, prompt, steps, stop, never):
    """Tokens of a naive loop: the whole row again for every one of them."""
    ids = list(prompt)
    while len(ids) < len(prompt) + steps and ids[-1] != stop:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].clone()
        logits[never] = -torch.inf
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]
