"""Reinforcement learning (R1): environments, rewards, rollouts, GRPO, rejection sampling, distillation."""
