"""Molecules: SMILES as RDKit reads them, salts taken off, as graphs of atoms and as MACCS keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Keys = npt.NDArray[np.float32]

_ELEMENTS = ("C", "N", "O", "S", "F", "Cl", "Br", "I", "P", "B", "Si", "Se", "Pt")
_HYBRIDS = ("SP", "SP2", "SP3")
# What else an atom's row says: aromatic, in a ring, R, S.
_FLAGS = 4
# One more of each for any other value.
_CHOICES: tuple[tuple[Any, ...], ...] = (_ELEMENTS, (1, 2, 3, 4), (0, 1, 2, 3), (-1, 0, 1), _HYBRIDS)
ATOM_WIDTH = sum(len(each) + 1 for each in _CHOICES) + _FLAGS
# Metals that are ions of salts: they can be taken off. A drug with another metal is a complex, and all parts are it.
_SALT_METALS = frozenset({"Li", "Na", "K", "Rb", "Cs", "Mg", "Ca", "Sr", "Ba", "Zn", "Al"})
_NO_METALS = frozenset({
    "H", "He", "B", "C", "N", "O", "F", "Ne", "Si", "P", "S", "Cl", "Ar", "Ge", "As", "Se", "Br", "Kr", "Te", "I", "Xe",
})  # fmt: skip


@dataclass(frozen=True)
class Molecule:
    """smiles, the canonical one of what is kept, by which two names are known to be one drug; and `parts`, what is kept
    and what is left out, in words, where the SMILES has several parts, else ""."""

    smiles: str
    parts: str = ""


def read_molecule(smiles: str) -> Molecule:
    """A molecule. Of several parts the one of most heavy atoms is kept (the first of several such), as of a salt; all
    of them where one holds a metal that makes no simple salts, such as platinum.

    Raises ValueError for what RDKit does not read.
    """
    from rdkit import Chem, rdBase

    with rdBase.BlockLogs():
        whole = Chem.MolFromSmiles(smiles)
    if whole is None or not whole.GetNumAtoms():
        raise ValueError(f"RDKit reads no molecule from {smiles!r}")
    parts = Chem.GetMolFrags(whole, asMols=True)
    if len(parts) == 1:
        return Molecule(Chem.MolToSmiles(whole))
    symbols = {atom.GetSymbol() for atom in whole.GetAtoms()}
    if metals := sorted(symbols - _NO_METALS - _SALT_METALS):
        return Molecule(Chem.MolToSmiles(whole), f"all {len(parts)} parts are kept, a complex of {', '.join(metals)}")
    kept = max(range(len(parts)), key=lambda number: parts[number].GetNumHeavyAtoms())
    others = ", ".join(Chem.MolToSmiles(part) for number, part in enumerate(parts) if number != kept)
    found = Chem.MolToSmiles(parts[kept])
    return Molecule(found, f"{found} is kept, {others} left out")


@dataclass(frozen=True)
class Graphs:
    """Molecules as graphs.

    atoms     (atoms, ATOM_WIDTH) float32, of all molecules one after the other
    bonds     (2, 2 bonds) int64, each bond in both directions
    molecule  (atoms,) int64, the molecule of each atom, from 0
    count     molecules
    """

    atoms: Tensor
    bonds: Tensor
    molecule: Tensor
    count: int

    @classmethod
    def of(cls, smiles: Sequence[str]) -> Graphs:
        """Of SMILES that read_molecule gave."""
        from rdkit import Chem

        rows: list[list[float]] = []
        bonds: list[tuple[int, int]] = []
        molecule: list[int] = []
        for number, each in enumerate(smiles):
            found = Chem.MolFromSmiles(each)
            first = len(rows)
            rows += [_atom(atom) for atom in found.GetAtoms()]
            for bond in found.GetBonds():
                ends = first + bond.GetBeginAtomIdx(), first + bond.GetEndAtomIdx()
                bonds += [ends, ends[::-1]]
            molecule += [number] * found.GetNumAtoms()
        pairs = torch.tensor(bonds, dtype=torch.long).reshape(-1, 2).T.contiguous()
        return cls(torch.tensor(rows), pairs, torch.tensor(molecule, dtype=torch.long), len(smiles))

    def to(self, device: torch.device) -> Graphs:
        return Graphs(self.atoms.to(device), self.bonds.to(device), self.molecule.to(device), self.count)

    def take(self, numbers: Tensor) -> Graphs:
        """Some of the molecules, by their ascending numbers (n,) int64."""
        if len(numbers) == self.count:
            return self
        place = torch.full((self.count,), -1, dtype=torch.long, device=numbers.device)
        place[numbers] = torch.arange(len(numbers), device=numbers.device)
        kept = place[self.molecule] >= 0
        new = torch.cumsum(kept, 0) - 1
        own = kept[self.bonds[0]]
        return Graphs(self.atoms[kept], new[self.bonds[:, own]], place[self.molecule[kept]], len(numbers))


def _atom(atom: Any) -> list[float]:
    """An atom's row: element, neighbours, hydrogens, charge and hybridisation, each one of its choices or "other"; and
    flags."""
    seen = (
        atom.GetSymbol(),
        atom.GetDegree(),
        atom.GetTotalNumHs(),
        atom.GetFormalCharge(),
        str(atom.GetHybridization()),
    )
    row: list[float] = []
    for value, choices in zip(seen, _CHOICES, strict=True):
        row += [float(value == choice) for choice in choices] + [float(value not in choices)]
    code = atom.GetProp("_CIPCode") if atom.HasProp("_CIPCode") else ""
    return [*row, float(atom.GetIsAromatic()), float(atom.IsInRing()), float(code == "R"), float(code == "S")]


def maccs_keys(smiles: Sequence[str]) -> Keys:
    """(molecules, 167) the MACCS keys, 0 or 1."""
    from rdkit import Chem
    from rdkit.Chem.rdMolDescriptors import GetMACCSKeysFingerprint

    return np.array([list(GetMACCSKeysFingerprint(Chem.MolFromSmiles(each))) for each in smiles], np.float32)
