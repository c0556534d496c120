// SPDX-License-Identifier: MIT
pragma solidity ^0.8.30;

import {AddressList} from "../libraries/AddressList.sol";
import {Members} from "./Members.sol";

/// @title The validators that count now, in each network: who joins and who leaves.
/// @notice A transaction loads the list when it first needs it and stores it once, if it has changed.
abstract contract Epochs is Members {
    /// The epoch in memory: read when it is first asked for, stored once where it has changed.
    struct Epoch {
        bool loaded;
        bool changed;
        address[] list;
    }

    function _load(Network storage network, Epoch memory epoch) internal view {
        if (epoch.loaded) return;
        epoch.loaded = true;
        epoch.list = AddressList.load(network.header.epoch);
    }

    function _store(Network storage network, Epoch memory epoch) internal {
        if (!epoch.changed) return;
        network.header.epoch = AddressList.store(epoch.list);
    }

    function _join(uint32 networkId, Network storage network, Epoch memory epoch, address account) internal {
        _load(network, epoch);
        (uint256 place, bool found) = AddressList.find(epoch.list, account);
        if (found) return;
        epoch.list = AddressList.inserted(epoch.list, place, account);
        epoch.changed = true;
        emit ValidatorJoined(networkId, account);
    }

    function _leave(uint32 networkId, Network storage network, Epoch memory epoch, address account) internal {
        _load(network, epoch);
        (uint256 place, bool found) = AddressList.find(epoch.list, account);
        if (!found) return;
        epoch.list = AddressList.removed(epoch.list, place);
        epoch.changed = true;
        emit ValidatorLeft(networkId, account);
    }

    function _leaveNow(uint32 networkId, Network storage network, address account) internal {
        Epoch memory epoch;
        _leave(networkId, network, epoch, account);
        _store(network, epoch);
    }
}
