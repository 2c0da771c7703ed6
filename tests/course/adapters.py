"""Where the course's tests find your functions. If you moved or renamed one, change its line."""

FUNCTIONS = {  # name in the tests: (module, name there)
    "grade": ("reward", "grade"),  # exercise 1
    "parse_action": ("tools", "parse_action"),  # 2
    "turn_is_valid": ("reward", "turn_is_valid"),
    "group_advantages": ("grpo", "group_advantages"),  # 3
    "kl_k3": ("grpo", "kl_k3"),  # 4
    "token_weights": ("grpo", "token_weights"),
    "policy_loss": ("grpo", "policy_loss"),
    "token_logps": ("grpo", "token_logps"),  # 5
    "_append_action": ("rollout", "_append_action"),  # 6
    "_append_observation": ("rollout", "_append_observation"),
    "update": ("train", "update"),  # 7
    "draw": ("model", "draw"),  # 8
    "packed_attention": ("grpo", "packed_attention"),  # 9
    "collate": ("rollout", "collate"),
}
