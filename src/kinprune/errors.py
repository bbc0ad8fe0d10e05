"""Every error a user can cause: each message says what was wrong, what was expected and how to fix it."""


class KinpruneError(Exception):
    """Base of all errors that are the input's fault; the command line prints it and exits with 2."""


class TaskError(KinpruneError):
    """The data of a task cannot be used."""


class BackboneError(KinpruneError):
    """A model, its weights or its preprocessing cannot be used."""


class UnitError(KinpruneError):
    """The model has no prunable unit, or a mask belongs to another unit space."""


class ImportanceError(KinpruneError):
    """An importance cannot be computed on this model."""


class BudgetError(KinpruneError):
    """A budget is malformed or cannot be reached."""


class TrainingError(KinpruneError):
    """Training cannot start or went wrong (a non-finite loss)."""


class ArtifactError(KinpruneError):
    """An artifact on disk is damaged, altered, or of a version this library does not read."""


class TransferabilityError(KinpruneError):
    """Transferability cannot be computed from what was given."""


class ExportError(KinpruneError):
    """An exported model is missing a dependency or does not answer as the original does."""


class BankError(KinpruneError):
    """A bank cannot be opened or written, is damaged, or belongs to another model."""


class DeviceError(KinpruneError):
    """A device's file is damaged, or was made for another backbone, precision or way of running it."""
