"""What a user can mend. Every such error says in one sentence what is wrong and what to do."""


class UserError(Exception):
    """Something that a user can mend; the message is one sentence that says how."""


class WeightsError(UserError, RuntimeError):
    """Weights are missing, damaged or unknown; the message is one sentence for the user."""


class TrainingError(UserError, RuntimeError):
    """Training cannot go on; the message is one sentence for the user."""
