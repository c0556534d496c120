// SPDX-License-Identifier: MIT
pragma solidity ^0.8.30;

import {IRegistry} from "../interfaces/IRegistry.sol";
import {ReputationUpdates} from "../libraries/ReputationUpdates.sol";
import {Epochs} from "./Epochs.sol";

/// @title What rounds change in Registry: reputations, stakes, admissions, convictions.
abstract contract RoundChanges is Epochs {
    uint256 private constant MAX_BURNS = 16;

    /// @inheritdoc IRegistry
    function openNetwork(uint32 networkId) external onlyRounds {
        _networks[networkId].header.open = true;
    }

    /// @inheritdoc IRegistry
    function applyRound(
        uint32 networkId,
        bytes calldata reputations,
        Admission[] calldata admissions,
        Slash[] calldata slashes
    ) external onlyRounds {
        Network storage network = _networks[networkId];
        Epoch memory epoch;
        if (!network.header.started) network.header.started = true;
        if (reputations.length != 0) _applyReputations(networkId, network, epoch, reputations);
        uint256 burned = 0;
        if (network.header.condemned != 0) burned = _burnCondemned(networkId, network, epoch);
        for (uint256 i = 0; i < slashes.length; ++i) {
            // A member unknown or withdrawn since the signatures were given must not block the round: it loses nothing.
            if (slashes[i].index >= network.header.total) continue;
            burned += _slash(networkId, network, epoch, slashes[i].index, slashes[i].amount);
        }
        for (uint256 i = 0; i < admissions.length; ++i) {
            if (admissions[i].index < network.header.total) _admit(networkId, network, epoch, admissions[i]);
        }
        _store(network, epoch);
        if (burned != 0) sno.burn(burned);
    }

    /// @inheritdoc IRegistry
    function convict(uint32 networkId, address account) external onlyRounds {
        Network storage network = _networks[networkId];
        uint256 indexPlusOne = network.indexOf[account];
        if (indexPlusOne == 0) revert NotRegistered(account);
        Entry storage entry = network.entries[indexPlusOne - 1];
        if (entry.role != Role.Validator || entry.away) revert NotAValidator(account);
        if (entry.convicted) revert Convicted(account);
        entry.convicted = true;
        network.condemned[network.header.condemned++] = indexPlusOne - 1;
        network.reputations[(indexPlusOne - 1) / 32].packed &= ~(uint256(0xff) << (((indexPlusOne - 1) % 32) * 8));
        _leaveNow(networkId, network, account);
        emit EquivocationProven(networkId, account);
    }

    /// Binds a member's node key to it, and lets a validator into the epoch. What has changed since the signatures were
    /// given must not block the round: a member that is gone, or whose key another proved before, is left out.
    function _admit(
        uint32 networkId,
        Network storage network,
        Epoch memory epoch,
        Admission calldata admission
    ) private {
        uint256 index = admission.index;
        Entry storage entry = network.entries[index];
        if (!_isUpright(network, index)) return;
        uint256 owner = network.ownerOf[entry.keyHash];
        if (owner != 0 && owner != index + 1) {
            Entry storage other = network.entries[owner - 1];
            if (other.verified || other.keyHash != entry.keyHash) return; // its own, or one that it has revoked
            _leave(networkId, network, epoch, other.account);
        }
        network.ownerOf[entry.keyHash] = index + 1;
        entry.verified = true;
        entry.capability = admission.capability;
        if (entry.role == Role.Validator) _join(networkId, network, epoch, entry.account);
        emit Admitted(networkId, entry.account, index, admission.capability);
    }

    function _applyReputations(
        uint32 networkId,
        Network storage network,
        Epoch memory epoch,
        bytes calldata updates
    ) private {
        uint256 total = network.header.total;
        uint256 length = updates.length;
        if (length % ReputationUpdates.UPDATE_BYTES != 0) revert BadReputationUpdate(length);
        unchecked {
            for (uint256 offset = 0; offset < length; offset += ReputationUpdates.UPDATE_BYTES) {
                (uint256 word, uint256 mask, uint256 lanes) = ReputationUpdates.read(updates, offset);
                Lanes storage current = network.reputations[word];
                if (word < total / 32 && ReputationUpdates.isWhole(mask, lanes)) {
                    current.packed = lanes;
                    continue;
                }
                if (!ReputationUpdates.within(word, mask, total)) revert BadReputationUpdate(offset);
                bool zeroed;
                (current.packed, zeroed) = ReputationUpdates.merge(current.packed, mask, lanes);
                if (zeroed) _cutOff(networkId, network, epoch, word, mask & ~ReputationUpdates.nonZero(lanes));
            }
        }
        emit ReputationsUpdated(networkId, updates);
    }

    /// The blacklisted leave the epoch at once.
    function _cutOff(uint32 networkId, Network storage network, Epoch memory epoch, uint256 word, uint256 zeroed)
        private
    {
        for (uint256 lane = 0; zeroed >> lane != 0; ++lane) {
            if (zeroed & (1 << lane) == 0) continue;
            _leave(networkId, network, epoch, network.entries[word * 32 + lane].account);
        }
    }

    function _slash(uint32 networkId, Network storage network, Epoch memory epoch, uint256 index, uint256 wanted)
        private
        returns (uint256 amount)
    {
        Entry storage entry = network.entries[index];
        amount = wanted < entry.stake ? wanted : entry.stake;
        entry.stake -= uint128(amount);
        if (entry.stake < stakeOf(entry.role)) _leave(networkId, network, epoch, entry.account);
        emit Slashed(networkId, entry.account, amount);
    }

    /// Capped, so that no crowd of the convicted can make a round too dear to execute; the rest follows.
    function _burnCondemned(uint32 networkId, Network storage network, Epoch memory epoch)
        private
        returns (uint256 burned)
    {
        uint16 left = network.header.condemned;
        for (uint256 i = 0; i < MAX_BURNS && left != 0; ++i) {
            burned += _slash(networkId, network, epoch, network.condemned[--left], type(uint256).max);
        }
        network.header.condemned = left;
    }
}
