"""Every family of causal LM in transformers, tiny: 2 layers of width 32, as far as the usual names
can tell its configuration so."""

import torch
from conftest import seeded
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

VOCABULARY = 61
SIZES = {  # by the names that families have for them; what a configuration lacks is left out
    0: "pad_token_id num_kv_shared_layers",
    0.2: "initializer_range init_std",
    1: "eos_token_id n_group topk_group n_shared_experts first_k_dense_replace",
    2: """num_hidden_layers n_layer decoder_layers encoder_layers num_layers num_key_value_heads
        num_kv_heads moe_k num_experts_per_tok bos_token_id type_vocab_size""",
    4: """num_attention_heads n_head decoder_attention_heads num_heads num_experts
        num_local_experts n_routed_experts moe_num_experts""",
    5: "sliding_window",
    8: """head_dim d_kv rotary_dim hidden_size_per_layer_input qk_rope_head_dim qk_nope_head_dim
        v_head_dim global_head_dim""",
    16: "q_lora_rank kv_lora_rank moe_intermediate_size shared_expert_intermediate_size",
    32: "hidden_size n_embd d_model word_embed_proj_dim embedding_size emb_dim",
    64: "intermediate_size ffn_dim decoder_ffn_dim d_ff n_inner ffn_hidden_size",
    128: "max_position_embeddings n_positions max_sequence_length seq_length",
    VOCABULARY: "vocab_size vocab_size_per_layer_input",
}
SIZES = {name: size for size, names in SIZES.items() for name in names.split()}
SIZES |= {"is_decoder": True, "tie_word_embeddings": False, "use_cache": True}
LATENT = {"num_key_value_heads": 4}  # multi-head latent attention has as many as heads


def tiny_family(name, sizes=SIZES, build=AutoModelForCausalLM):
    """A model of the family with random weights, biases and norms included."""
    cls = CONFIG_MAPPING[name]
    names = {*cls().to_dict(), *getattr(cls, "attribute_map", {})}
    config = cls(**{key: value for key, value in sizes.items() if key in names})
    text = config.get_text_config()
    for key in sizes.keys() & vars(text).keys() if text is not config else ():
        setattr(text, key, sizes[key])
    return seeded(build, config)


def other_model(folder, family, build=AutoModelForCausalLM, **values):
    """The folder's tokenizer with a random model of another family."""
    sizes = SIZES | {"vocab_size": 512, "max_position_embeddings": 256} | values
    tiny_family(family, sizes, build).save_pretrained(folder)


def greedy(model, prompt, steps, stop, never):
    """Tokens of a naive loop: the whole row again for every one of them."""
    ids = list(prompt)
    while len(ids) < len(prompt) + steps and ids[-1] != stop:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].clone()
        logits[never] = -torch.inf
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]
