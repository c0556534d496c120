// SPDX-License-Identifier: MIT
pragma solidity ^0.8.30;

import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {IRegistry} from "./interfaces/IRegistry.sol";
import {ISNO} from "./interfaces/ISNO.sol";
import {ReputationUpdates} from "./libraries/ReputationUpdates.sol";

/// @title Members of all networks: see IRegistry. No owner: what is not fixed at construction is decided by rounds.
contract Registry is IRegistry {
    using SafeERC20 for ISNO;

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
        uint64 exitAt; // when the exit was requested; 0: taking part
        uint128 stake;
        bool away; // exited and withdrawn
        bytes32 keyHash;
        bytes32 tip;
    }

    struct Network {
        bool open;
        bool started; // a round was executed: from now on validators join with the next round
        Entry[] entries;
        address[] epoch; // validators that count now
        address[] joining; // validators that count from the next round on
        mapping(address account => uint256 indexPlusOne) indexOf;
        mapping(bytes32 keyHash => uint256 indexPlusOne) ownerOf;
        mapping(address account => uint256 placePlusOne) epochPlace;
        mapping(uint256 word => uint256 lanes) reputations;
    }

    uint8 private constant NEWCOMER = 1;
    uint256 private constant MAX_JOINERS = 16;

    ISNO public immutable sno;
    address public immutable rounds;
    uint256 public immutable exitDelay;
    uint256 private immutable _userStake;
    uint256 private immutable _workerStake;
    uint256 private immutable _validatorStake;

    mapping(uint32 networkId => Network) private _networks;

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

    // -- by members ----------------------------------------------------------------------------------------------------

    /// @inheritdoc IRegistry
    function register(Role role, bytes32 keyHash, uint32 networkId) external returns (uint32 index) {
        Network storage network = _networks[networkId];
        if (!network.open) revert UnknownNetwork(networkId);
        uint256 stake = stakeOf(role);
        index = _bind(network, keyHash);
        Entry storage entry = network.entries[index];
        entry.role = role;
        entry.stake = uint128(stake);
        emit Registered(networkId, msg.sender, role, index, keyHash, stake);
        if (role == Role.Validator) {
            // A joiner raises the quorum: were it counted at once, it could void signatures that are being collected.
            // Before the first round there are none, and the genesis validators make up the first epoch.
            if (network.started) network.joining.push(msg.sender);
            else _joinEpoch(networkId, network, msg.sender);
        }
        if (stake != 0) sno.safeTransferFrom(msg.sender, address(this), stake);
    }

    /// @inheritdoc IRegistry
    function requestExit(uint32 networkId) external {
        Network storage network = _networks[networkId];
        Entry storage entry = _own(network);
        if (entry.away) revert NotRegistered(msg.sender);
        if (entry.exitAt == 0) entry.exitAt = uint64(block.timestamp);
        _leaveEpoch(networkId, network, msg.sender);
        emit ExitRequested(networkId, msg.sender, entry.exitAt + exitDelay);
    }

    /// @inheritdoc IRegistry
    function withdraw(uint32 networkId) external {
        Entry storage entry = _own(_networks[networkId]);
        if (entry.exitAt == 0 || entry.away) revert ExitNotRequested(msg.sender);
        uint256 until = entry.exitAt + exitDelay;
        if (block.timestamp < until) revert StakeLocked(until);
        uint256 amount = entry.stake;
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

    // -- by rounds -----------------------------------------------------------------------------------------------------

    /// @inheritdoc IRegistry
    function openNetwork(uint32 networkId) external onlyRounds {
        _networks[networkId].open = true;
    }

    /// @inheritdoc IRegistry
    function applyReputations(uint32 networkId, bytes calldata updates) external onlyRounds {
        Network storage network = _networks[networkId];
        uint256 total = network.entries.length;
        uint256 offset = 0;
        while (offset < updates.length) {
            (uint256 word, uint256 mask, uint256 next) = ReputationUpdates.read(updates, offset);
            if (next == 0 || !ReputationUpdates.within(word, mask, total)) revert BadReputationUpdate(offset);
            (uint256 lanes, uint256 zeroed) = ReputationUpdates.merge(network.reputations[word], updates, next, mask);
            network.reputations[word] = lanes;
            if (zeroed != 0) _cutOff(networkId, network, word, zeroed);
            offset = next;
        }
        if (offset != 0) emit ReputationsUpdated(networkId, updates);
    }

    /// @inheritdoc IRegistry
    function slash(uint32 networkId, Slash[] calldata slashes) external onlyRounds {
        Network storage network = _networks[networkId];
        uint256 burned = 0;
        for (uint256 i = 0; i < slashes.length; ++i) {
            // A member unknown or withdrawn since the signatures were given must not block the round: it loses nothing.
            if (slashes[i].index >= network.entries.length) continue;
            Entry storage entry = network.entries[slashes[i].index];
            uint256 amount = slashes[i].amount < entry.stake ? slashes[i].amount : entry.stake;
            entry.stake -= uint128(amount);
            burned += amount;
            if (entry.stake < stakeOf(entry.role)) _leaveEpoch(networkId, network, entry.account);
            emit Slashed(networkId, entry.account, amount);
        }
        if (burned != 0) sno.burn(burned);
    }

    /// @inheritdoc IRegistry
    function startEpoch(uint32 networkId) external onlyRounds {
        Network storage network = _networks[networkId];
        if (!network.started) network.started = true;
        uint256 length = network.joining.length;
        if (length == 0) return;
        // Capped, so that no crowd of joiners can make a round too dear to execute; the rest joins with the next rounds.
        uint256 end = length > MAX_JOINERS ? length - MAX_JOINERS : 0;
        while (length > end) {
            address account = network.joining[--length];
            network.joining.pop();
            uint256 index = network.indexOf[account] - 1;
            if (network.entries[index].role != Role.Validator || !_inGoodStanding(network, index)) continue;
            _joinEpoch(networkId, network, account);
        }
    }

    // -- views ---------------------------------------------------------------------------------------------------------

    /// @inheritdoc IRegistry
    function liveAmong(uint32 networkId, address[] memory accounts)
        external
        view
        returns (uint256 count, address[] memory signers, uint256 total)
    {
        Network storage network = _networks[networkId];
        signers = accounts;
        for (uint256 i = 0; i < accounts.length; ++i) {
            if (network.epochPlace[accounts[i]] == 0) continue;
            signers[count++] = accounts[i];
        }
        total = network.epoch.length;
    }

    /// @inheritdoc IRegistry
    function validators(uint32 networkId) external view returns (address[] memory) {
        return _networks[networkId].epoch;
    }

    /// @inheritdoc IRegistry
    function members(uint32 networkId, uint256 from, uint256 count)
        external
        view
        returns (Member[] memory page, uint256 total)
    {
        Network storage network = _networks[networkId];
        total = network.entries.length;
        if (from > total) from = total;
        if (count > total - from) count = total - from;
        page = new Member[](count);
        for (uint256 i = 0; i < count; ++i) {
            page[i] = _member(network, from + i);
        }
    }

    /// @inheritdoc IRegistry
    function memberOf(uint32 networkId, address account) external view returns (Member memory member) {
        Network storage network = _networks[networkId];
        uint256 indexPlusOne = network.indexOf[account];
        if (indexPlusOne != 0) member = _member(network, indexPlusOne - 1);
    }

    /// @inheritdoc IRegistry
    function accountOf(uint32 networkId, bytes32 keyHash) external view returns (address) {
        Network storage network = _networks[networkId];
        uint256 indexPlusOne = network.ownerOf[keyHash];
        return indexPlusOne == 0 ? address(0) : network.entries[indexPlusOne - 1].account;
    }

    /// @inheritdoc IRegistry
    function reputation(uint32 networkId, uint256 index) external view returns (uint8) {
        return _reputation(_networks[networkId], index);
    }

    /// @inheritdoc IRegistry
    function stakeOf(Role role) public view returns (uint256) {
        if (role == Role.Validator) return _validatorStake;
        if (role == Role.Worker) return _workerStake;
        if (role == Role.User) return _userStake;
        revert UnknownRole();
    }

    // -- inside --------------------------------------------------------------------------------------------------------

    /// Finds or makes the caller's entry and binds it to `keyHash`; both directions stay one to one.
    function _bind(Network storage network, bytes32 keyHash) private returns (uint32 index) {
        if (keyHash == bytes32(0)) revert ZeroKey();
        uint256 indexPlusOne = network.indexOf[msg.sender];
        uint256 owner = network.ownerOf[keyHash];
        if (owner != 0 && owner != indexPlusOne) revert KeyTaken(keyHash, network.entries[owner - 1].account);
        if (indexPlusOne == 0) {
            network.entries.push();
            indexPlusOne = network.entries.length;
            network.indexOf[msg.sender] = indexPlusOne;
            network.entries[indexPlusOne - 1].account = msg.sender;
            uint256 shift = ((indexPlusOne - 1) % 32) * 8;
            network.reputations[(indexPlusOne - 1) / 32] |= uint256(NEWCOMER) << shift;
        }
        index = uint32(indexPlusOne - 1);
        Entry storage entry = network.entries[index];
        if (entry.role != Role.None) {
            if (!entry.away) revert AlreadyRegistered(msg.sender);
            if (_reputation(network, index) == 0) revert Blacklisted(msg.sender);
            delete network.ownerOf[entry.keyHash];
            entry.away = false;
            entry.exitAt = 0;
            entry.tip = bytes32(0);
        }
        entry.keyHash = keyHash;
        network.ownerOf[keyHash] = indexPlusOne;
    }

    function _cutOff(uint32 networkId, Network storage network, uint256 word, uint256 zeroed) private {
        for (uint256 lane = 0; lane < 32; ++lane) {
            if (zeroed & (1 << lane) == 0) continue;
            _leaveEpoch(networkId, network, network.entries[word * 32 + lane].account);
        }
    }

    function _joinEpoch(uint32 networkId, Network storage network, address account) private {
        if (network.epochPlace[account] != 0) return;
        network.epoch.push(account);
        network.epochPlace[account] = network.epoch.length;
        emit ValidatorJoined(networkId, account);
    }

    function _leaveEpoch(uint32 networkId, Network storage network, address account) private {
        uint256 place = network.epochPlace[account];
        if (place == 0) return;
        address last = network.epoch[network.epoch.length - 1];
        network.epoch[place - 1] = last;
        network.epochPlace[last] = place;
        network.epoch.pop();
        delete network.epochPlace[account];
        emit ValidatorLeft(networkId, account);
    }

    function _own(Network storage network) private view returns (Entry storage) {
        uint256 indexPlusOne = network.indexOf[msg.sender];
        if (indexPlusOne == 0) revert NotRegistered(msg.sender);
        return network.entries[indexPlusOne - 1];
    }

    function _reputation(Network storage network, uint256 index) private view returns (uint8) {
        return uint8(network.reputations[index / 32] >> ((index % 32) * 8));
    }

    function _inGoodStanding(Network storage network, uint256 index) private view returns (bool) {
        Entry storage entry = network.entries[index];
        return entry.exitAt == 0 && !entry.away && entry.stake >= stakeOf(entry.role)
            && _reputation(network, index) != 0;
    }

    function _member(Network storage network, uint256 index) private view returns (Member memory member) {
        Entry storage entry = network.entries[index];
        member.account = entry.account;
        member.role = entry.role;
        member.reputation = _reputation(network, index);
        member.index = uint32(index);
        member.exitAt = entry.exitAt;
        member.stake = entry.stake;
        member.keyHash = entry.keyHash;
        member.tip = entry.tip;
        member.live = entry.role == Role.Validator
            ? network.epochPlace[entry.account] != 0
            : _inGoodStanding(network, index);
    }
}
