@echo off
rem Side-Step for Windows: double-click this file. It can be run again at any time; what is there already is kept.
rem It installs uv, Python and the packages into this folder, PyTorch for this machine's GPU, and a shortcut to the wizard.

setlocal EnableExtensions
title Side-Step installation
cd /d "%~dp0"
echo.
echo Side-Step installation, in "%CD%"
echo.

rem --- 1. The folder -----------------------------------------------------------------------------------------------
if not exist "train.py" (
    echo ERROR: train.py is not in this folder. Unpack the whole archive, then run this file from there.
    goto failed
)
echo "%CD%"| findstr /i /c:"\OneDrive\" >nul && echo NOTE: this folder is inside OneDrive. A folder such as C:\Side-Step is faster and never half synchronised.

rem Packages nest deeply: without long paths, a folder name of more than about 80 characters makes them fail to unpack.
set "LONG_PATHS=0x0"
for /f "tokens=3" %%v in ('reg query "HKLM\SYSTEM\CurrentControlSet\Control\FileSystem" /v LongPathsEnabled 2^>nul ^| findstr LongPathsEnabled') do set "LONG_PATHS=%%v"
set "HERE=%CD%"
if not "%LONG_PATHS%"=="0x1" if not "%HERE:~80,1%"=="" (
    echo ERROR: the path of this folder is too long for Windows as it is set up here.
    echo Move the folder to a short path such as C:\Side-Step, or switch long paths on in a terminal run as administrator:
    echo   reg add HKLM\SYSTEM\CurrentControlSet\Control\FileSystem /v LongPathsEnabled /t REG_DWORD /d 1 /f
    goto failed
)

rem --- 2. The graphics driver --------------------------------------------------------------------------------------
set "NVIDIA="
where nvidia-smi >nul 2>nul && nvidia-smi >nul 2>nul && set "NVIDIA=yes"
if defined NVIDIA (
    echo NVIDIA driver: found.
) else (
    echo NOTE: no working NVIDIA driver was found. Side-Step then trains on the CPU, which is slow.
    echo If this machine has an NVIDIA card, install its driver first, then run this file again.
)

rem --- 3. uv, which brings Python and the packages -----------------------------------------------------------------
set "PATH=%USERPROFILE%\.local\bin;%PATH%"
where uv >nul 2>nul
if errorlevel 1 (
    echo Installing uv ...
    where winget >nul 2>nul && winget install --id astral-sh.uv --exact --silent --accept-source-agreements --accept-package-agreements
)
set "PATH=%LOCALAPPDATA%\Microsoft\WinGet\Links;%PATH%"
where uv >nul 2>nul
if errorlevel 1 (
    powershell -NoProfile -ExecutionPolicy Bypass -Command "irm https://astral.sh/uv/install.ps1 | iex"
)
where uv >nul 2>nul
if errorlevel 1 (
    echo ERROR: uv could not be installed. Install it by hand from https://docs.astral.sh/uv and run this file again.
    goto failed
)

echo Installing Python and the packages ...
uv sync --inexact
if errorlevel 1 (
    echo ERROR: the packages could not be installed. The lines above say why; a virus scanner or a full disk are the usual reasons.
    goto failed
)

rem --- 4. PyTorch for this machine: uv looks at the driver and takes the build that fits -----------------------------
echo Installing PyTorch for this machine ...
uv --no-config pip install "torch>=2.11,<2.15" --torch-backend=auto
if errorlevel 1 (
    echo ERROR: PyTorch could not be installed. Run this file again; what is there already is kept.
    goto failed
)

rem --- 5. Does it work? --------------------------------------------------------------------------------------------
uv run --no-sync train.py --plain doctor
if errorlevel 1 (
    echo ERROR: the check failed. If it speaks of a DLL, install the Microsoft Visual C++ Redistributable ^(x64^) and run this file again.
    goto failed
)

rem --- 6. A shortcut to the wizard, beside this file and on the desktop -----------------------------------------------
> "Side-Step.bat" (
    echo @echo off
    echo title Side-Step
    echo cd /d "%%~dp0"
    echo set "PATH=%%USERPROFILE%%\.local\bin;%%LOCALAPPDATA%%\Microsoft\WinGet\Links;%%PATH%%"
    echo uv run --no-sync train.py %%*
    echo if errorlevel 1 pause
)
set "TARGET=%CD%\Side-Step.bat"
set "FOLDER=%CD%"
powershell -NoProfile -Command "$s = (New-Object -ComObject WScript.Shell); $l = $s.CreateShortcut((Join-Path $s.SpecialFolders('Desktop') 'Side-Step.lnk')); $l.TargetPath = $env:TARGET; $l.WorkingDirectory = $env:FOLDER; $l.Save()"
if errorlevel 1 echo NOTE: no shortcut could be put on the desktop. Start the wizard with Side-Step.bat in this folder.

echo.
echo Done. Start the wizard with the shortcut Side-Step on the desktop, or with Side-Step.bat in this folder.
echo In a terminal: uv run --no-sync train.py
echo.
pause
exit /b 0

:failed
echo.
echo The installation is not complete. Nothing that was there before has been removed.
pause
exit /b 1
