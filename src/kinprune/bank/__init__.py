"""The bank: what pruning one backbone for earlier tasks taught, kept where many can use it."""

from kinprune.bank.exchange import read_record, write_record
from kinprune.bank.merging import merge
from kinprune.bank.migrating import upgrade_bank
from kinprune.bank.opening import bank_exists, create_bank, create_like, open_bank
from kinprune.bank.probes import ProbeChunk
from kinprune.bank.record import Accuracy, Entry, Header, Record, check_backbone, check_space, record_key
from kinprune.bank.storage import Bank, Lessons
from kinprune.bank.verification import Problem, Report, clean, verify

__all__ = [
    "Accuracy",
    "Bank",
    "Entry",
    "Header",
    "Lessons",
    "ProbeChunk",
    "Problem",
    "Record",
    "Report",
    "bank_exists",
    "check_backbone",
    "check_space",
    "clean",
    "create_bank",
    "create_like",
    "merge",
    "open_bank",
    "read_record",
    "record_key",
    "upgrade_bank",
    "verify",
    "write_record",
]
