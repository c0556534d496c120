// SPDX-License-Identifier: MIT
pragma solidity ^0.8.30;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";

/// @title The token of the network: fixed genesis, an emission that is a pure function of time, and one minter.
interface ISNO is IERC20 {
    /// @notice An amount minted at genesis to one account.
    struct Allocation {
        address account;
        uint256 amount;
    }

    /// @notice How new tokens come into being: `perPeriod` wei every `period` seconds, multiplied by
    /// `keepBps` / 10,000 after each `decayAfter` seconds, never below `tailPerPeriod`.
    struct Schedule {
        uint128 perPeriod;
        uint128 tailPerPeriod;
        uint32 period;
        uint32 decayAfter;
        uint16 keepBps;
    }

    /// @dev `caller` is not the contract that executes rounds.
    error OnlyRounds(address caller);
    /// @dev `supply` would be more than the schedule allows now.
    error MintPastSchedule(uint256 supply, uint256 allowed);
    /// @dev A schedule whose period, decay or rates make no sense.
    error BadSchedule();

    /// @notice The only account that mints and pays rewards: the Rounds contract, fixed at construction.
    function rounds() external view returns (address);

    /// @notice Wei that existed at genesis.
    function genesisSupply() external view returns (uint256);

    /// @notice The most that may exist at time `t` (seconds since 1970) beyond the genesis. Pure in `t`.
    function mintable(uint256 t) external view returns (uint256);

    /// @notice What the schedule emits from one time to a later one.
    function mintableBetween(uint256 from, uint256 until) external view returns (uint256);

    /// @notice Where a network's rewards lie until they are claimed: no network can reach another's.
    function vaultOf(uint32 networkId) external view returns (address);

    /// @notice Mints `amount` wei into a network's vault. Reverts with MintPastSchedule where more would exist than the
    /// genesis and `mintable(now)`.
    function mint(uint32 networkId, uint256 amount) external;

    /// @notice Pays a reward out of a network's vault.
    function pay(uint32 networkId, address to, uint256 amount) external;

    /// @notice Destroys rewards in a network's vault that a quorum found to be wrong.
    function takeBack(uint32 networkId, uint256 amount) external;

    /// @notice Destroys `amount` wei of the caller.
    function burn(uint256 amount) external;
}
