// SPDX-License-Identifier: MIT
pragma solidity ^0.8.30;

import {IRegistry} from "../interfaces/IRegistry.sol";
import {AddressList} from "../libraries/AddressList.sol";
import {Quorum} from "../libraries/Quorum.sol";
import {Members} from "./Members.sol";

/// @title What Registry tells of its members, and which of them signed.
abstract contract MemberViews is Members {
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
