"""Where vectors (sentence, semantics, palette) go: timestep embedding, tokens, or both."""

from composer_jax.configs.ablations import sweep


def get_sweep() -> dict:
    return sweep({word: [f"model.vectors={word}"] for word in ("both", "timestep", "tokens")})
