// SPDX-License-Identifier: MIT
pragma solidity ^0.8.30;

import {ERC20} from "@openzeppelin/contracts/token/ERC20/ERC20.sol";
import {ERC20Permit} from "@openzeppelin/contracts/token/ERC20/extensions/ERC20Permit.sol";
import {ISNO} from "./interfaces/ISNO.sol";

/// @title SNO: see ISNO. No votes extension: checkpoints would make every reward claim expensive.
contract SNO is ERC20, ERC20Permit, ISNO {
    /// @dev Hashed, so that nobody has a key of any vault.
    uint160 private constant _VAULTS = uint160(uint256(keccak256("Smartnodes: rewards not yet claimed")));

    /// @inheritdoc ISNO
    address public immutable rounds;
    uint256 public immutable genesisTime;
    uint256 public immutable genesisSupply;
    uint256 private immutable _perPeriod;
    uint256 private immutable _tailPerPeriod;
    uint256 private immutable _period;
    uint256 private immutable _decayAfter;
    uint256 private immutable _keepBps;

    modifier onlyRounds() {
        if (msg.sender != rounds) revert OnlyRounds(msg.sender);
        _;
    }

    /// @param rounds_ address at which Rounds will be deployed; its constructor refuses any other.
    constructor(address rounds_, Schedule memory schedule, Allocation[] memory genesis)
        ERC20("Smartnodes", "SNO")
        ERC20Permit("Smartnodes")
    {
        if (
            schedule.period == 0 || schedule.decayAfter == 0 || schedule.keepBps >= 10_000
                || schedule.tailPerPeriod > schedule.perPeriod
        ) revert BadSchedule();
        rounds = rounds_;
        genesisTime = block.timestamp;
        _perPeriod = schedule.perPeriod;
        _tailPerPeriod = schedule.tailPerPeriod;
        _period = schedule.period;
        _decayAfter = schedule.decayAfter;
        _keepBps = schedule.keepBps;
        for (uint256 i = 0; i < genesis.length; ++i) {
            _mint(genesis[i].account, genesis[i].amount);
        }
        genesisSupply = totalSupply();
    }

    /// @inheritdoc ISNO
    function mintable(uint256 t) public view returns (uint256) {
        if (t <= genesisTime) return 0;
        uint256 left = t - genesisTime;
        uint256 rate = _perPeriod;
        uint256 scaled = 0; // wei times period: divided once at the end, so that no wei is lost between years
        // Ends soon: with keepBps < 10,000 the rate falls to the tail, or to zero, geometrically.
        while (left > _decayAfter && rate > _tailPerPeriod) {
            scaled += rate * _decayAfter;
            left -= _decayAfter;
            rate = (rate * _keepBps) / 10_000;
            if (rate < _tailPerPeriod) rate = _tailPerPeriod;
        }
        return (scaled + rate * left) / _period;
    }

    /// @inheritdoc ISNO
    function mintableBetween(uint256 from, uint256 until) external view returns (uint256) {
        return mintable(until) - mintable(from);
    }

    /// @inheritdoc ISNO
    function vaultOf(uint32 networkId) public pure returns (address) {
        return address(uint160(_VAULTS + networkId));
    }

    /// @inheritdoc ISNO
    function mint(uint32 networkId, uint256 amount) external onlyRounds {
        uint256 supply = totalSupply() + amount;
        uint256 allowed = genesisSupply + mintable(block.timestamp);
        if (supply > allowed) revert MintPastSchedule(supply, allowed);
        _mint(vaultOf(networkId), amount);
    }

    /// @inheritdoc ISNO
    function pay(uint32 networkId, address to, uint256 amount) external onlyRounds {
        _transfer(vaultOf(networkId), to, amount);
    }

    /// @inheritdoc ISNO
    function takeBack(uint32 networkId, uint256 amount) external onlyRounds {
        _burn(vaultOf(networkId), amount);
    }

    /// @inheritdoc ISNO
    function burn(uint256 amount) external {
        _burn(msg.sender, amount);
    }
}
