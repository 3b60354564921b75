"""The same six trainings in other frameworks: what start-up, messages and memory cost there and here.

Each peer trains one plain PyTorch link (`plain.train_plain_link`, without a teacher) at each of the six phantom hospitals;
Chainward runs its chain without distillation. What differs is what is around the trainings.
"""
