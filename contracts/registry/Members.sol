// SPDX-License-Identifier: MIT
pragma solidity ^0.8.30;

import {IRegistry} from "../interfaces/IRegistry.sol";
import {ISNO} from "../interfaces/ISNO.sol";

/// @title What Registry keeps of the members of each network, what each role stakes, and who is in good standing.
abstract contract Members is IRegistry {
    /// @notice Stake of each role, and how long an exit takes.
    struct Settings {
        uint128 userStake;
        uint128 workerStake;
        uint128 validatorStake;
        uint64 exitDelay;
    }

    struct Entry {
        address account;
        Role role;
        uint40 exitAt; // when the exit was requested; 0: taking part
        bool away; // exited and withdrawn
        bool verified; // a round has verified that the node key is this account's
        bool convicted; // of equivocation: its stake is burned with the next round
        uint128 stake;
        uint32 capability;
        bytes32 keyHash;
        bytes32 tip;
    }

    /// What every round reads, in one word.
    struct Header {
        bool open;
        bool started; // a round was executed: from now on members come in by rounds only
        uint32 total; // members
        uint16 condemned; // entries of `condemned` whose stake is still to be burned
        address epoch; // the validators that count now: see AddressList.sol
    }

    /// Reputations of 32 members.
    struct Lanes {
        uint256 packed;
    }

    struct Network {
        Header header;
        mapping(uint256 index => Entry) entries;
        mapping(uint256 place => uint256 index) condemned;
        mapping(address account => uint256 indexPlusOne) indexOf;
        mapping(bytes32 keyHash => uint256 indexPlusOne) ownerOf;
        mapping(uint256 word => Lanes) reputations;
    }

    ISNO public immutable sno;
    address public immutable rounds;
    uint256 public immutable exitDelay;
    uint256 private immutable _userStake;
    uint256 private immutable _workerStake;
    uint256 private immutable _validatorStake;

    mapping(uint32 networkId => Network) internal _networks;

    modifier onlyRounds() {
        if (msg.sender != rounds) revert OnlyRounds(msg.sender);
        _;
    }

    constructor(ISNO sno_, Settings memory settings) {
        if (settings.validatorStake == 0) revert ValidatorStakeIsZero(); // or anyone joins the quorum
        sno = sno_;
        rounds = sno_.rounds();
        exitDelay = settings.exitDelay;
        _userStake = settings.userStake;
        _workerStake = settings.workerStake;
        _validatorStake = settings.validatorStake;
    }

    /// @inheritdoc IRegistry
    function stakeOf(Role role) public view returns (uint256) {
        if (role == Role.Validator) return _validatorStake;
        if (role == Role.Worker) return _workerStake;
        if (role == Role.User) return _userStake;
        revert UnknownRole();
    }

    function _reputation(Network storage network, uint256 index) internal view returns (uint8) {
        return uint8(network.reputations[index / 32].packed >> ((index % 32) * 8));
    }

    /// Taking part, paid for and not blacklisted; whether its key is its own is another question.
    function _isUpright(Network storage network, uint256 index) internal view returns (bool) {
        Entry storage entry = network.entries[index];
        return entry.exitAt == 0 && !entry.away && !entry.convicted && entry.stake >= stakeOf(entry.role)
            && _reputation(network, index) != 0;
    }
}
