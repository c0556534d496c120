// SPDX-License-Identifier: MIT
pragma solidity ^0.8.30;

import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {IRegistry} from "./interfaces/IRegistry.sol";
import {ISNO} from "./interfaces/ISNO.sol";
import {AddressList} from "./libraries/AddressList.sol";
import {Quorum} from "./libraries/Quorum.sol";
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

    /// The epoch in memory: read when it is first asked for, stored once where it has changed.
    struct Epoch {
        bool loaded;
        bool changed;
        address[] list;
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

    uint8 private constant NEWCOMER = 1;
    uint256 private constant MAX_BURNS = 16;

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
        if (!network.header.open) revert UnknownNetwork(networkId);
        if (keyHash == bytes32(0)) revert ZeroKey();
        uint256 stake = stakeOf(role);
        index = _enter(network);
        Entry storage entry = network.entries[index];
        entry.role = role;
        entry.stake = uint128(stake);
        entry.keyHash = keyHash;
        emit Registered(networkId, msg.sender, role, index, keyHash, stake);
        uint256 owner = network.ownerOf[keyHash];
        if (owner == 0 && !network.header.started) {
            // Nobody can verify before the first round, and the genesis validators make up the first epoch. A key taken
            // here without right goes to its owner as soon as a round verifies it.
            network.ownerOf[keyHash] = uint256(index) + 1;
            if (role == Role.Validator) {
                Epoch memory epoch;
                _join(networkId, network, epoch, msg.sender);
                _store(network, epoch);
            }
        } else if (owner != 0 && network.entries[owner - 1].verified) {
            revert KeyTaken(keyHash, network.entries[owner - 1].account);
        }
        if (stake != 0) sno.safeTransferFrom(msg.sender, address(this), stake);
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

    // -- by rounds -----------------------------------------------------------------------------------------------------

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

    // -- views ---------------------------------------------------------------------------------------------------------

    /// @inheritdoc IRegistry
    function liveSigners(uint32 networkId, bytes32 digest, bytes calldata signatures)
        external
        view
        returns (bytes memory signers, uint256 found, uint256 live)
    {
        address[] memory epoch = AddressList.load(_networks[networkId].header.epoch);
        live = epoch.length;
        uint256 count = Quorum.count(signatures);
        signers = new bytes(count * Quorum.ADDRESS_BYTES);
        uint256 place = 0;
        address last = address(0);
        unchecked {
            for (uint256 i = 0; i < count; ++i) {
                address signer = Quorum.recover(digest, signatures, i);
                if (signer <= last) revert Quorum.SignersNotAscending(i); // so they are distinct
                last = signer;
                while (place < live && epoch[place] < signer) ++place;
                if (place == live || epoch[place] != signer) continue;
                Quorum.put(signers, found++, signer);
            }
        }
        Quorum.cut(signers, found);
    }

    /// @inheritdoc IRegistry
    function isLiveValidator(uint32 networkId, address account) external view returns (bool) {
        return AddressList.contains(AddressList.load(_networks[networkId].header.epoch), account);
    }

    /// @inheritdoc IRegistry
    function validators(uint32 networkId) external view returns (address[] memory) {
        return AddressList.load(_networks[networkId].header.epoch);
    }

    /// @inheritdoc IRegistry
    function members(uint32 networkId, uint256 from, uint256 count)
        external
        view
        returns (Member[] memory page, uint256 total)
    {
        Network storage network = _networks[networkId];
        total = network.header.total;
        if (from > total) from = total;
        if (count > total - from) count = total - from;
        page = new Member[](count);
        address[] memory epoch = AddressList.load(network.header.epoch);
        for (uint256 i = 0; i < count; ++i) {
            page[i] = _member(network, epoch, from + i);
        }
    }

    /// @inheritdoc IRegistry
    function memberOf(uint32 networkId, address account) external view returns (Member memory member) {
        Network storage network = _networks[networkId];
        uint256 indexPlusOne = network.indexOf[account];
        if (indexPlusOne != 0) member = _member(network, AddressList.load(network.header.epoch), indexPlusOne - 1);
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
            if (other.verified) return;
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

    function _load(Network storage network, Epoch memory epoch) private view {
        if (epoch.loaded) return;
        epoch.loaded = true;
        epoch.list = AddressList.load(network.header.epoch);
    }

    function _store(Network storage network, Epoch memory epoch) private {
        if (!epoch.changed) return;
        network.header.epoch = AddressList.store(epoch.list);
    }

    function _join(uint32 networkId, Network storage network, Epoch memory epoch, address account) private {
        _load(network, epoch);
        (uint256 place, bool found) = AddressList.find(epoch.list, account);
        if (found) return;
        epoch.list = AddressList.inserted(epoch.list, place, account);
        epoch.changed = true;
        emit ValidatorJoined(networkId, account);
    }

    function _leave(uint32 networkId, Network storage network, Epoch memory epoch, address account) private {
        _load(network, epoch);
        (uint256 place, bool found) = AddressList.find(epoch.list, account);
        if (!found) return;
        epoch.list = AddressList.removed(epoch.list, place);
        epoch.changed = true;
        emit ValidatorLeft(networkId, account);
    }

    function _leaveNow(uint32 networkId, Network storage network, address account) private {
        Epoch memory epoch;
        _leave(networkId, network, epoch, account);
        _store(network, epoch);
    }

    function _own(Network storage network) private view returns (Entry storage) {
        uint256 indexPlusOne = network.indexOf[msg.sender];
        if (indexPlusOne == 0) revert NotRegistered(msg.sender);
        return network.entries[indexPlusOne - 1];
    }

    function _reputation(Network storage network, uint256 index) private view returns (uint8) {
        return uint8(network.reputations[index / 32].packed >> ((index % 32) * 8));
    }

    /// Taking part, paid for and not blacklisted; whether its key is its own is another question.
    function _isUpright(Network storage network, uint256 index) private view returns (bool) {
        Entry storage entry = network.entries[index];
        return entry.exitAt == 0 && !entry.away && !entry.convicted && entry.stake >= stakeOf(entry.role)
            && _reputation(network, index) != 0;
    }

    function _member(Network storage network, address[] memory epoch, uint256 index)
        private
        view
        returns (Member memory member)
    {
        Entry storage entry = network.entries[index];
        member.account = entry.account;
        member.role = entry.role;
        member.reputation = _reputation(network, index);
        member.index = uint32(index);
        member.exitAt = entry.exitAt;
        member.stake = entry.stake;
        member.keyHash = entry.keyHash;
        member.tip = entry.tip;
        member.verified = entry.verified;
        member.capability = entry.capability;
        member.live = entry.role == Role.Validator
            ? AddressList.contains(epoch, entry.account)
            : network.ownerOf[entry.keyHash] == index + 1 && _isUpright(network, index);
    }
}
