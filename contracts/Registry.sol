// SPDX-License-Identifier: MIT
pragma solidity ^0.8.30;

import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {IRegistry} from "./interfaces/IRegistry.sol";
import {ISNO} from "./interfaces/ISNO.sol";
import {MemberViews} from "./registry/MemberViews.sol";
import {Members} from "./registry/Members.sol";
import {RoundChanges} from "./registry/RoundChanges.sol";

/// @title Members of all networks: see IRegistry. No owner: what is not fixed at construction is decided by rounds.
/// @notice Here is what members call themselves; `registry/` holds what rounds change and what anybody reads.
contract Registry is RoundChanges, MemberViews {
    using SafeERC20 for ISNO;

    uint8 private constant NEWCOMER = 1;

    constructor(ISNO sno_, Settings memory settings) Members(sno_, settings) {}

    /// @inheritdoc IRegistry
    function register(Role role, bytes32 keyHash, uint32 networkId) external returns (uint32 index) {
        Network storage network = _networks[networkId];
        if (!network.header.open) revert UnknownNetwork(networkId);
        uint256 stake = stakeOf(role);
        index = _enter(network);
        Entry storage entry = network.entries[index];
        bool firstComer = _ask(network, index, keyHash);
        entry.role = role;
        entry.stake = uint128(stake);
        entry.keyHash = keyHash;
        emit Registered(networkId, msg.sender, role, index, keyHash, stake);
        if (firstComer && role == Role.Validator) {
            Epoch memory epoch;
            _join(networkId, network, epoch, msg.sender);
            _store(network, epoch);
        }
        if (stake != 0) sno.safeTransferFrom(msg.sender, address(this), stake);
    }

    /// @inheritdoc IRegistry
    function rotateKey(bytes32 keyHash, uint32 networkId) external {
        Network storage network = _networks[networkId];
        Entry storage entry = _own(network);
        if (entry.away) revert NotRegistered(msg.sender);
        uint256 index = network.indexOf[msg.sender] - 1;
        bytes32 revoked = entry.keyHash;
        // A verified key stays its account's for ever: nobody registers it again, and what it signed is answered for.
        if (!entry.verified && network.ownerOf[revoked] == index + 1) delete network.ownerOf[revoked];
        _ask(network, index, keyHash);
        entry.keyHash = keyHash;
        entry.verified = false;
        emit KeyRotated(networkId, msg.sender, revoked, keyHash);
    }

    /// @inheritdoc IRegistry
    function requestExit(uint32 networkId) external {
        Network storage network = _networks[networkId];
        Entry storage entry = _own(network);
        if (entry.away) revert NotRegistered(msg.sender);
        if (entry.exitAt == 0) entry.exitAt = uint40(block.timestamp);
        _leaveNow(networkId, network, msg.sender);
        emit ExitRequested(networkId, msg.sender, entry.exitAt + exitDelay);
    }

    /// @inheritdoc IRegistry
    function withdraw(uint32 networkId) external {
        Entry storage entry = _own(_networks[networkId]);
        if (entry.exitAt == 0 || entry.away) revert ExitNotRequested(msg.sender);
        uint256 until = entry.exitAt + exitDelay;
        if (block.timestamp < until) revert StakeLocked(until);
        uint256 amount = entry.stake;
        if (entry.convicted && amount != 0) revert Convicted(msg.sender);
        entry.stake = 0;
        entry.away = true;
        emit Withdrawn(networkId, msg.sender, amount);
        if (amount != 0) sno.safeTransfer(msg.sender, amount);
    }

    /// @inheritdoc IRegistry
    function postTip(uint32 networkId, bytes32 tip) external {
        Network storage network = _networks[networkId];
        Entry storage entry = _own(network);
        if (entry.role != Role.Validator || entry.exitAt != 0) revert NotAValidator(msg.sender);
        entry.tip = tip;
        emit TipPosted(networkId, msg.sender, tip);
    }

    // -- inside --------------------------------------------------------------------------------------------------------

    /// The caller's entry: a new one, or that of a member who had left, without its key and its admission.
    function _enter(Network storage network) private returns (uint32 index) {
        uint256 indexPlusOne = network.indexOf[msg.sender];
        if (indexPlusOne == 0) {
            index = network.header.total++;
            network.indexOf[msg.sender] = uint256(index) + 1;
            network.entries[index].account = msg.sender;
            network.reputations[index / 32].packed |= uint256(NEWCOMER) << ((index % 32) * 8);
            return index;
        }
        index = uint32(indexPlusOne - 1);
        Entry storage entry = network.entries[index];
        if (!entry.away) revert AlreadyRegistered(msg.sender);
        if (_reputation(network, index) == 0) revert Blacklisted(msg.sender);
        if (network.ownerOf[entry.keyHash] == indexPlusOne) delete network.ownerOf[entry.keyHash];
        entry.away = entry.verified = false;
        entry.exitAt = 0;
        entry.capability = 0;
        entry.tip = bytes32(0);
    }

    /// Whether the key is nobody's and, before the first round, now this member's: nobody can verify then, and the genesis
    /// validators make up the first epoch. A key taken so without right goes to its owner when a round verifies it. Refuses
    /// a key that is verified, and one that is revoked: it has an owner who has another key.
    function _ask(Network storage network, uint256 index, bytes32 keyHash) private returns (bool firstComer) {
        if (keyHash == bytes32(0)) revert ZeroKey();
        uint256 owner = network.ownerOf[keyHash];
        if (owner == 0) {
            firstComer = !network.header.started;
            if (firstComer) network.ownerOf[keyHash] = index + 1;
            return firstComer;
        }
        Entry storage holder = network.entries[owner - 1];
        if (holder.verified || holder.keyHash != keyHash) revert KeyTaken(keyHash, holder.account);
    }

    function _own(Network storage network) private view returns (Entry storage) {
        uint256 indexPlusOne = network.indexOf[msg.sender];
        if (indexPlusOne == 0) revert NotRegistered(msg.sender);
        return network.entries[indexPlusOne - 1];
    }
}
